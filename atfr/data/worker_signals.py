"""Keep signals away from worker processes.

Ctrl-C and a hang-up reach every process of a terminal, and USR1 and USR2 may. Only the main process reacts; it then
ends its workers.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

MAIN_ONLY = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def ignore_main_signals() -> None:
    """Ignore the signals in `MAIN_ONLY`. Call this first in a worker process."""
    for number in MAIN_ONLY:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def main_signals_blocked() -> Iterator[None]:
    """Block the signals while processes are started, so that none reaches a worker before it ignores them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, MAIN_ONLY)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
