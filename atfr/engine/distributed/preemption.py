"""Stopping on a signal: it sets a flag, and training saves after the current step and ends.

A batch system can send USR1 or USR2 before a time limit (`#SBATCH --signal=USR1@120`). TERM comes before a kill, INT is Ctrl-C,
and HUP comes when the terminal is closed. In a SLURM job, USR1 and USR2 also requeue the job. This module has no slow imports,
so a program can call `listen` before it imports anything else.
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
FROM_BATCH_SYSTEM = (signal.SIGUSR1, signal.SIGUSR2)  # a second one of these does not end the process
TRY_AGAIN = 75  # exit code, EX_TEMPFAIL of sysexits.h: run the same command again
SAME_SIGNAL_S = 1.0  # seconds within which signals count as one: batch system, terminal and parent process may all send it


class Interrupted(BaseException):
    """A signal stopped the program, and everything is saved. Not an Exception, so that no error handler catches it."""

    def __init__(self, number: int, where: str) -> None:
        self.signal = signal.Signals(number)
        super().__init__(f"stopped by {self.signal.name} {where}")


class StopFlag:
    """The first stop signal received, or None."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._first: float | None = None  # time of the first TERM, INT or HUP
        self._where: str | None = None  # inside `raises_immediately`: where the program is, for the message

    @contextmanager
    def raises_immediately(self, where: str) -> Iterator[None]:
        """In this block, which does nothing that must be saved, a signal raises Interrupted immediately.

        The signal may have ended other processes too. An error that follows from this also becomes Interrupted.
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
    def only_sets_flag(self) -> Iterator[None]:
        """In this block inside `raises_immediately`, a signal only sets the flag. The block checks it."""
        before, self._where = self._where, None
        try:
            yield
        except Exception as error:
            if self.signal is None or not _may_follow(error):
                raise
            raise Interrupted(self.signal, "before it could save, because another process of the job ended") from error
        finally:
            self._where = before

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)
            if self._where is not None:
                raise Interrupted(number, self._where)

    def _came(self, number: int) -> None:
        """Called in the watching thread. A second TERM, INT or HUP ends the process."""
        if number in FROM_BATCH_SYSTEM:
            return
        if number == signal.SIGHUP:
            _leave_lost_terminal()
        if self._first is None:
            self._first = time.monotonic()
            if number == signal.SIGINT and os.isatty(2) and os.environ.get("RANK", "0") == "0":
                os.write(2, b"\nstopping; press Ctrl-C again to end immediately\n")
        elif time.monotonic() - self._first > SAME_SIGNAL_S:
            os._exit(128 + number)


def listen() -> StopFlag:
    """Install handlers that set a flag, and return the flag, the same at each call. Call this in the main thread.

    A second TERM, INT or HUP ends the process, even if its main thread waits for other ranks and never checks the flag.
    """
    flag = _listener() or StopFlag()
    for number in handled_signals():
        signal.signal(number, flag._note)
    _watch()
    return flag


def handled_signals() -> list[signal.Signals]:
    """Return the signals to handle: without INT and HUP if this process was started to ignore them (`nohup`, `&`)."""
    return [number for number in SIGNALS if number not in (signal.SIGINT, signal.SIGHUP) or signal.getsignal(number) != signal.SIG_IGN]


def _may_follow(error: Exception) -> bool:
    """Return whether an error may be due to the end of another process: a loader worker, a pool worker, or another rank."""
    if isinstance(error, (ChildProcessError, ConnectionError, EOFError)):
        return True
    # torch raises plain RuntimeErrors if a loader worker or another rank is gone.
    return type(error) is RuntimeError or type(error).__name__ in ("BrokenProcessPool", "DistBackendError", "DistNetworkError", "OtherFailed")


def _leave_lost_terminal() -> None:
    """Redirect stdout and stderr to /dev/null if their terminal is gone, because writing to it would fail."""
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
    """Start a thread that sees signals even if the main thread, in which Python handles them, is blocked."""
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
    """Print the message and end the program: with 0 if it is a SLURM job that was requeued, else with TRY_AGAIN."""
    # After a TERM the job was cancelled, or SLURM itself requeues it.
    job = os.environ.get("SLURM_JOB_ID") if error.signal in FROM_BATCH_SYSTEM else None
    if is_main:
        print(f"{error}; {'the job is requeued' if job is not None else 'run the same command again to continue'}", file=sys.stderr, flush=True)
        if job is not None:
            done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
            if done.returncode:
                print(f"error: scontrol requeue {job}: {done.stderr.strip()}; run the same command again to continue", file=sys.stderr, flush=True)
                sys.exit(TRY_AGAIN)
    sys.exit(TRY_AGAIN if job is None else 0)
