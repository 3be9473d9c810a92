"""Signals in the processes that read or write videos for this one.

Ctrl-C and the end of a terminal reach all processes that run there; USR1 and USR2 may, too. The main process answers
them, and ends the others.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

LEFT_TO_MAIN = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def leave_signals_to_main() -> None:
    """Ignore these signals. Call this in worker processes."""
    for number in LEFT_TO_MAIN:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def starting_processes() -> Iterator[None]:
    """Block the signals in this block: a process that is started in it does not see them before it can ignore them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_MAIN)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
