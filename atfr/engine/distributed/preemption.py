"""Stopping on a signal: it sets a flag, training saves at the next step and ends.

USR1 and USR2 are what a batch system is told to send before a time limit (`#SBATCH --signal=USR1@120`), TERM
is what comes before a kill, INT is Ctrl-C, and HUP comes when the terminal is closed. In a SLURM job the first two also
put the job back into the queue. This module imports nothing slow, so that a program can listen before it imports
anything else.
"""

from __future__ import annotations

import functools
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Iterator

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
FROM_BATCH_SYSTEM = (signal.SIGUSR1, signal.SIGUSR2)  # a second one of these leaves time to save
TRY_AGAIN = 75  # exit code, EX_TEMPFAIL of sysexits.h: the same command goes on
ONE_TOLD = 1.0  # seconds within which signals count as one: a batch system, a terminal and a parent may all send it


class Interrupted(BaseException):
    """The program was told to stop, and everything is saved. No Exception: it may come anywhere, and is no error of what it meets."""

    def __init__(self, number: int, where: str) -> None:
        self.signal = signal.Signals(number)
        super().__init__(f"stopped by {self.signal.name} {where}")


class StopFlag:
    """The first stop signal that came, or None."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._first: float | None = None  # time of the first one after which a second ends the process
        self._where: str | None = None  # not to be waited for: where the program is

    @contextmanager
    def at_once(self, where: str) -> Iterator[None]:
        """In this block a signal raises Interrupted wherever the program is: a restart loses nothing of what is done there.

        An error that follows from the same signal, which has ended other processes too, is no error either.
        """
        before, self._where = self._where, where
        try:
            if self.signal is not None:
                raise Interrupted(self.signal, where)
            yield
        except Exception as error:
            if self.signal is None or not _may_follow(error):
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
        except Exception as error:
            if self.signal is None or not _may_follow(error):
                raise
            raise Interrupted(self.signal, "before it could save, since another of its processes ended") from error
        finally:
            self._where = before

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)
            if self._where is not None:
                raise Interrupted(number, self._where)

    def _came(self, number: int) -> None:
        """In the watching thread: the second TERM, INT or HUP ends the process. After a USR1, there is still time to save."""
        if number in FROM_BATCH_SYSTEM:
            return
        if number == signal.SIGHUP:
            _leave_lost_terminal()
        if self._first is None:
            self._first = time.monotonic()
            if number == signal.SIGINT and os.isatty(2) and os.environ.get("RANK", "0") == "0":
                os.write(2, b"\nstopping; a second Ctrl-C ends at once\n")
        elif time.monotonic() - self._first > ONE_TOLD:
            os._exit(128 + number)


def listen() -> StopFlag:
    """Have the signals set a flag from now on, the same one at each call. For the main thread only, as Python's signals are.

    A second TERM, INT or HUP ends the process at once, even if its main thread waits for others and never looks at the flag.
    """
    flag = _listener() or StopFlag()
    for number in heeded():
        signal.signal(number, flag._note)
    _watch()
    return flag


def heeded() -> list[signal.Signals]:
    """Return the signals to answer: INT and HUP only where the process that started this one does not have them ignored (`nohup`, `&`)."""
    return [number for number in SIGNALS if number not in (signal.SIGINT, signal.SIGHUP) or signal.getsignal(number) != signal.SIG_IGN]


def _may_follow(error: Exception) -> bool:
    """Return whether an error may be due to the end of another process: a loader's, a pool's, another rank."""
    if isinstance(error, (ChildProcessError, ConnectionError, EOFError)):
        return True
    # Torch raises plain RuntimeErrors where a loader's worker or another process is gone.
    return type(error) is RuntimeError or type(error).__name__ in ("BrokenProcessPool", "DistBackendError", "DistNetworkError", "OtherFailed")


def _leave_lost_terminal() -> None:
    """Redirect stdout and stderr to /dev/null if their terminal is gone, because writing would fail."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


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
    requeue = job is not None and error.signal in FROM_BATCH_SYSTEM
    if is_main:
        print(f"{error}; {'put back into the queue' if requeue else 'the same command goes on'}", file=sys.stderr, flush=True)
        if requeue:
            done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
            if done.returncode:
                print(f"error: scontrol requeue {job}: {done.stderr.strip()}; the same command goes on", file=sys.stderr, flush=True)
                sys.exit(TRY_AGAIN)
    sys.exit(0 if requeue else TRY_AGAIN)
