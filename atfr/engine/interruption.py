"""Stopping when the machine is about to be taken away: a signal sets a flag, training saves at the next step and ends.

USR1 and USR2 are what a batch system is told to send before a time limit (`#SBATCH --signal=USR1@120`), TERM
is what comes before a kill. In a SLURM job the first two also put the job back into the queue. This module imports
nothing slow, so that a program can listen before it imports anything else.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from types import FrameType
from typing import Iterator

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
TRY_AGAIN = 75  # exit code, EX_TEMPFAIL of sysexits.h: the same command goes on
ONE_TOLD = 1.0  # seconds within which signals count as one: a batch system and a parent may both pass it on


class Interrupted(BaseException):
    """The program was told to stop, and everything is saved. No Exception: it may come anywhere, and is no error of what it meets."""

    def __init__(self, number: int, where: str) -> None:
        self.signal = signal.Signals(number)
        super().__init__(f"stopped by {self.signal.name} {where}")


class StopFlag:
    """The signal that came, if one did. A loader's workers, forked meanwhile, are not ended by USR1 or USR2 either."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._first_term: float | None = None  # when that was
        self._where: str | None = None  # not to be waited for: where the program is

    @contextmanager
    def at_once(self, where: str) -> Iterator[None]:
        """In this block a signal raises Interrupted wherever the program is: a restart loses nothing of what is done there.

        Processes of its own that the same signal ended are no error either.
        """
        before, self._where = self._where, where
        try:
            if self.signal is not None:
                raise Interrupted(self.signal, where)
            yield
        except Exception as error:
            if self.signal is None:
                raise
            raise Interrupted(self.signal, where) from error
        finally:
            self._where = before

    @contextmanager
    def only_noted(self) -> Iterator[None]:
        """Inside `at_once`, a block that looks at the flag itself."""
        before, self._where = self._where, None
        try:
            yield
        finally:
            self._where = before

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)
            if self._where is not None:
                raise Interrupted(number, self._where)

    def _came(self, number: int) -> None:
        """In the watching thread: the second TERM kills. One after a USR1 is a batch system that still gives time to save."""
        if number != signal.SIGTERM:
            return
        if self._first_term is None:
            self._first_term = time.monotonic()
        elif time.monotonic() - self._first_term > ONE_TOLD:
            os._exit(128 + number)


def listen() -> StopFlag:
    """From now on the signals set a flag, the same at each call. For the main thread only, as Python's signals are.

    A second TERM ends the process there and then, even if its main thread waits for others and will never look at the flag.
    """
    flag = _listener() or StopFlag()
    for number in SIGNALS:
        signal.signal(number, flag._note)
    _watch()
    return flag


def _listener() -> StopFlag | None:
    listener = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return listener if isinstance(listener, StopFlag) else None


@functools.cache
def _watch() -> None:
    """A thread that sees signals when the main thread, in which Python handles them, does not come to it."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def watch() -> None:
        while number := os.read(reading, 1):
            listener = _listener()
            if listener is not None and number[0] in SIGNALS:
                listener._came(number[0])

    threading.Thread(target=watch, daemon=True).start()


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
