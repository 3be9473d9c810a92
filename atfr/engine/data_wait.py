"""A warning if training spends too much time waiting for data."""

from __future__ import annotations

import logging
import os

from atfr.engine.settings import TrainerSettings

log = logging.getLogger(__name__)

MOST = 0.2  # largest fraction of the time that may be spent waiting
LEAST_STEPS = 20  # before a warning


class DataWait:
    """Sums up the time of the steps, and the time they waited for their batches."""

    def __init__(self) -> None:
        self.steps, self.waited, self.total = 0, 0.0, 0.0
        self.warned = False

    def add(self, *, waited: float, total: float) -> None:
        """Add a step: seconds waited, and seconds from the end of the previous step to the end of this one."""
        self.steps += 1
        self.waited += waited
        self.total += total

    def warn(self, settings: TrainerSettings) -> None:
        """Log a warning if the steps so far waited too long, once in a run."""
        if self.warned or self.steps < LEAST_STEPS or self.waited <= MOST * self.total:
            return
        self.warned = True
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        log.warning(
            f"{self.waited / self.total:.0%} of the training time is spent waiting for data: set trainer.workers higher ({settings.workers} per rank now;"
            f" this machine has {cores} cores), or re-encode the videos to the training size with a keyframe every 10 to 15 frames"
        )
