"""Stopping when the machine is about to be taken away: a signal sets a flag, training saves at the next step and ends.

USR1 and USR2 are what a batch system is told to send before a time limit (`#SBATCH --signal=USR1@120`), TERM
is what comes before a kill. In a SLURM job the first two also put the job back into the queue.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from types import FrameType
from typing import Iterator

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
TRY_AGAIN = 75  # exit code, EX_TEMPFAIL of sysexits.h: the same command goes on


class StopFlag:
    """The signal that came, if one did. A loader's workers, forked meanwhile, are not ended by USR1 or USR2 either."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)


@contextmanager
def listening() -> Iterator[StopFlag]:
    """Signals set the flag meanwhile. For the main thread only, as Python's signals are."""
    flag = StopFlag()
    before = {number: signal.signal(number, flag._note) for number in SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Interrupted(Exception):
    """Training was told to stop, and everything is saved."""

    def __init__(self, number: int, where: str) -> None:
        self.signal = signal.Signals(number)
        super().__init__(f"stopped by {self.signal.name} {where}")


def end(error: Interrupted, *, is_main: bool) -> None:
    """Say so, requeue the SLURM job if it is one that should be, and end with 0 if it was and with TRY_AGAIN if not."""
    job = os.environ.get("SLURM_JOB_ID")
    # TERM: cancelled, or SLURM itself puts it back.
    requeue = job is not None and error.signal in (signal.SIGUSR1, signal.SIGUSR2)
    if is_main:
        print(f"{error}; {'put back into the queue' if requeue else 'the same command goes on'}", file=sys.stderr, flush=True)
        if requeue:
            done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
            if done.returncode:
                print(f"error: scontrol requeue {job}: {done.stderr.strip()}; the same command goes on", file=sys.stderr, flush=True)
                sys.exit(TRY_AGAIN)
    sys.exit(0 if requeue else TRY_AGAIN)
