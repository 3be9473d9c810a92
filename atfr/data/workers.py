"""Run a function on many files in worker processes; a file that hangs or crashes one does not end the others."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from types import ModuleType
from typing import Any, Generic, NamedTuple, TypeVar

from atfr.data.worker_signals import ignore_main_signals, main_signals_blocked

T = TypeVar("T")

Heartbeat = Callable[[], None]

_READY, _ALIVE = "ready", "alive"  # messages of a worker besides its results, which are tuples


class Outcome(NamedTuple, Generic[T]):
    """The result of one item, or the reason why there is none."""

    item: Any
    result: T | None
    reason: str = ""


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_each(work: Callable[[Any, Heartbeat], T], items: Iterable[Any], *, processes: int, timeout_s: float) -> Generator[Outcome[T], None, None]:
    """Call `work(item, heartbeat)` for each item in `processes` spawned processes; yield outcomes in any order.

    `work` and the items must be picklable, and defined in another module than `__main__`. An exception of `work` becomes the
    reason of its outcome. A process that dies, or neither returns nor calls `heartbeat` for `timeout_s` seconds (0: no limit), is killed and replaced.

    Raises:
        ChildProcessError: a process cannot start.
    """
    todo = deque(items)
    workers = [_Worker(work) for _ in range(min(processes, len(todo)))]
    try:
        while todo or any(worker.busy for worker in workers):
            for worker in workers:
                if todo and worker.ready and not worker.busy:
                    worker.give(todo.popleft())
            waiting = [worker.connection for worker in workers if worker.busy or not worker.ready]
            readable = set(wait(waiting, timeout=_seconds_left(workers, timeout_s)))
            for number, worker in enumerate(workers):
                outcome = worker.receive() if worker.connection in readable else worker.check_timeout(timeout_s)
                if outcome is not None:
                    yield outcome
                if worker.lost:
                    worker.end()
                    workers[number] = _Worker(work)
    finally:
        for worker in workers:
            worker.end()


def _seconds_left(workers: list[_Worker], timeout_s: float) -> float | None:
    """Return the seconds until the first busy worker times out."""
    if not timeout_s:
        return None
    return max(0.0, min((worker.since + timeout_s - time.monotonic() for worker in workers if worker.busy), default=timeout_s))


class _Worker:
    """A worker process, its item and the time of its last message."""

    def __init__(self, work: Callable[[Any, Heartbeat], Any]) -> None:
        # A fork of a process with threads can hang.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(work, theirs), daemon=True)
        with main_signals_blocked(), _program_not_imported():
            self.process.start()
        theirs.close()  # so that the pipe closes when the process ends
        self.ready = self.busy = self.lost = False
        self.since = time.monotonic()
        self.item: Any = None

    def give(self, item: Any) -> None:
        self.item, self.busy, self.since = item, True, time.monotonic()
        with suppress(OSError):  # it died while idle; the next wait reports that
            self.connection.send(item)

    def receive(self) -> Outcome | None:
        """Receive a message; return the outcome if it is one, or if the process has died (`lost`)."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            self.lost = True
            if not self.ready:
                raise ChildProcessError(f"a process could not start (exit code {self.process.exitcode})") from None
            return Outcome(self.item, None, f"its process ended unexpectedly (exit code {self.process.exitcode})")
        self.since = time.monotonic()
        if message == _READY:
            self.ready = True
        elif message != _ALIVE:
            self.busy = False
            return Outcome(self.item, *message)
        return None

    def check_timeout(self, timeout_s: float) -> Outcome | None:
        if not (self.busy and timeout_s and time.monotonic() - self.since >= timeout_s):
            return None
        self.lost = True
        return Outcome(self.item, None, f"no answer within {timeout_s:g} s: its decoder or its disk hangs, or timeout_s is too short")

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


@contextmanager
def _program_not_imported() -> Iterator[None]:
    """Keep processes that are spawned meanwhile from importing the program again, and with it torch: seconds and memory in each."""
    program = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = program


def _serve(work: Callable[[Any, Heartbeat], Any], connection: Connection) -> None:
    ignore_main_signals()
    with suppress(EOFError, OSError):  # the parent has ended
        connection.send(_READY)
        while True:
            item = connection.recv()
            try:
                message = work(item, lambda: connection.send(_ALIVE)), ""
            except Exception as error:
                message = None, getattr(error, "reason", "") or " ".join(str(error).split()) or type(error).__name__
            connection.send(message)
