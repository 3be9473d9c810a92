"""One function over many files, in processes that may hang or crash over one of them without ending the rest."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, NamedTuple, TypeVar

from atfr.data.worker_signals import leave_signals_to_main, starting_processes

T = TypeVar("T")

Alive = Callable[[], None]

_READY, _ALIVE = "ready", "alive"  # what a process says besides its results, which are tuples


class Outcome(NamedTuple, Generic[T]):
    """What came of one file: a result, or the reason why there is none."""

    item: Any
    result: T | None
    reason: str = ""


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_each(work: Callable[[Any, Alive], T], items: Iterable[Any], *, processes: int, timeout_s: float) -> Iterator[Outcome[T]]:
    """`work(item, alive)` of every item in `processes` spawned processes; outcomes as they come, in any order.

    `work` and the items must be picklable. An exception of `work` is the reason of its outcome. A process that dies,
    or gives no sign for `timeout_s` seconds (0: no limit) - no result, no call of `alive` - is replaced, whatever
    native code it is stuck in. Raises ChildProcessError when a process cannot even start.
    """
    todo = deque(items)
    workers = [_Worker(work) for _ in range(min(processes, len(todo)))]
    try:
        while todo or any(worker.busy for worker in workers):
            for worker in workers:
                if todo and worker.ready and not worker.busy:
                    worker.give(todo.popleft())
            heard = set(wait([worker.connection for worker in workers if worker.busy or not worker.ready], timeout=_patience(workers, timeout_s)))
            for place, worker in enumerate(workers):
                outcome = worker.hear() if worker.connection in heard else worker.overdue(timeout_s)
                if outcome is not None:
                    yield outcome
                if worker.lost:
                    worker.end()
                    workers[place] = _Worker(work)
    finally:
        for worker in workers:
            worker.end()


def _patience(workers: list[_Worker], timeout_s: float) -> float | None:
    """Seconds until the first busy worker is overdue."""
    if not timeout_s:
        return None
    return max(0.0, min((worker.since + timeout_s - time.monotonic() for worker in workers if worker.busy), default=timeout_s))


class _Worker:
    """A process, what it works on, and since when it has not been heard of."""

    def __init__(self, work: Callable[[Any, Alive], Any]) -> None:
        # Spawned, since a fork of a process in which libraries have started threads can hang.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(work, theirs), daemon=True)
        with starting_processes():
            self.process.start()
        theirs.close()  # its end of the pipe must close with it
        self.ready = self.busy = self.lost = False
        self.since = time.monotonic()
        self.item: Any = None

    def give(self, item: Any) -> None:
        self.item, self.busy, self.since = item, True, time.monotonic()
        with suppress(OSError):  # it died while idle, which the next wait will tell
            self.connection.send(item)

    def hear(self) -> Outcome | None:
        """What it has to say: an outcome, or that it lives, or (`lost`) nothing any more."""
        try:
            said = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            self.lost = True
            if not self.ready:
                raise ChildProcessError(f"a process could not start (exit code {self.process.exitcode})") from None
            return Outcome(self.item, None, f"the process that read it ended unexpectedly (exit code {self.process.exitcode})")
        self.since = time.monotonic()
        if said == _READY:
            self.ready = True
        elif said != _ALIVE:
            self.busy = False
            return Outcome(self.item, *said)
        return None

    def overdue(self, timeout_s: float) -> Outcome | None:
        if not (self.busy and timeout_s and time.monotonic() - self.since >= timeout_s):
            return None
        self.lost = True
        return Outcome(self.item, None, f"no answer within {timeout_s:g} s: its decoder or its disk hangs, or timeout_s is too short for it")

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(work: Callable[[Any, Alive], Any], connection: Connection) -> None:
    leave_signals_to_main()
    with suppress(EOFError, OSError):  # the parent is gone
        connection.send(_READY)
        while True:
            item = connection.recv()
            try:
                said = work(item, lambda: connection.send(_ALIVE)), ""
            except Exception as error:
                said = None, getattr(error, "reason", "") or " ".join(str(error).split()) or type(error).__name__
            connection.send(said)
