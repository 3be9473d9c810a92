"""How much of a training goes to waiting for data, and a word about it when it is too much."""

from __future__ import annotations

import os

from atfr.engine.settings import TrainerSettings

MOST = 0.2  # share of the time that may go to waiting
LEAST_STEPS = 20  # before this many there is nothing to judge by


class DataWait:
    """Adds up the steps of a run and what each waited for its batch."""

    def __init__(self) -> None:
        self.steps, self.waited, self.total = 0, 0.0, 0.0
        self.told = False

    def add(self, *, waited: float, total: float) -> None:
        """One step: seconds waited, and seconds from the step before it to its end."""
        self.steps += 1
        self.waited += waited
        self.total += total

    def warning(self, settings: TrainerSettings) -> str | None:
        """What to tell the user, at most once in a run; None as long as there is nothing to tell."""
        if self.told or self.steps < LEAST_STEPS or self.waited <= MOST * self.total:
            return None
        self.told = True
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return (
            f"{self.waited / self.total:.0%} of the training time goes to waiting for data: set trainer.workers higher ({settings.workers} for each process"
            f" now; this machine has {cores} cores), or re-encode the videos to the size that is trained on, with a keyframe every 10 to 15 frames"
        )
