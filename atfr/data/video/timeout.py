"""Limit how long a read may take, so that a decoder that hangs ends in an error that names its file.

In the main process, a read under a limit runs in a separate thread, which is abandoned at the timeout. This requires that
native code releases the interpreter lock, as PyAV, decord (through ctypes) and file reads do. Code that hangs with the lock
held blocks the main process.

In a worker, this module only records in shared memory which file is read. The DataLoader's own timeout raises in the main
process, which then looks up the file; this works even if the worker holds its lock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.utils.data import get_worker_info

T = TypeVar("T")

_NOTHING = -1.0
_TICKS = 100


class TimeLimit:
    """Time limit of a dataset's reads: `seconds` per read (0: no limit), in `workers` processes."""

    def __init__(self, seconds: float = 0.0, *, workers: int = 0) -> None:
        self.seconds = seconds
        # Per worker: the number of the video that it reads, and the start by time.monotonic, which all processes share.
        self._reads = torch.full((workers, 2), _NOTHING, dtype=torch.float64).share_memory_()

    def read(self, read: Callable[[], T], *, number: int, path: str) -> T:
        """Call `read()`, which reads video `number` of the dataset from the file `path`.

        Raises:
            TimeoutError: it takes too long (in the main process only). Its thread may continue.
        """
        worker = get_worker_info()
        if worker is None:
            return _run_with_timeout(read, path, self.seconds) if self.seconds > 0 else read()
        if worker.id >= len(self._reads):  # of a DataLoader that `atfr.data.loader` has not built
            return read()
        self._reads[worker.id] = torch.tensor([number, time.monotonic()], dtype=torch.float64)
        try:
            return read()
        finally:
            self._reads[worker.id, 0] = _NOTHING

    def current_reads(self) -> list[tuple[int, float]]:
        """Return the current reads of the workers: (number of the video, seconds so far), longest first."""
        reads = [(int(number), time.monotonic() - since) for number, since in self._reads.tolist() if number != _NOTHING]
        return sorted(reads, key=lambda item: -item[1])


def _run_with_timeout(read: Callable[[], T], path: str, seconds: float) -> T:
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(read())
        except BaseException as error:  # re-raised in the caller's thread
            errors.append(error)

    # A daemon, so that a read that hangs does not prevent the program from exiting.
    thread = threading.Thread(target=run, name=f"read {path}", daemon=True)
    thread.start()
    # In ticks, since the clock goes on while a batch system has suspended the job, and the read does not.
    for _ in range(_TICKS):
        thread.join(seconds / _TICKS)
        if not thread.is_alive():
            break
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"cannot read {path}: no answer within {seconds:g} s: its decoder or its disk hangs; leave the file out or raise trainer.timeout_s")
    return results[0]
