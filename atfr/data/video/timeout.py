"""A limit on how long a read may take: a decoder that never comes back ends in an error that names its file.

In the main process a read under a limit runs in a thread of its own, which is left behind when the time is up. That
works as long as the native code lets go of the interpreter lock, as PyAV, decord's calls through ctypes and file reads
do. Code that hangs with the lock held stops the main process, and nothing in Python can end it; in a worker it can.

A worker's read is not stopped here. The worker writes down in shared memory which file it reads, the DataLoader's
own timeout strikes in the main process, whatever the worker holds, and the file is looked up.
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


class TimeLimit:
    """For one dataset and its loader: `seconds` a read may take (0: any time), `workers` processes that read."""

    def __init__(self, seconds: float = 0.0, *, workers: int = 0) -> None:
        self.seconds = seconds
        # A row a worker: the number of the video that it reads, and since when. time.monotonic is one clock for all
        # processes of a machine.
        self._reads = torch.full((workers, 2), _NOTHING, dtype=torch.float64).share_memory_()

    def read(self, read: Callable[[], T], *, number: int, path: str) -> T:
        """`read()`, which is about video `number` of the dataset, in the file `path`.

        Raises TimeoutError, in the main process only, when it takes too long; it may then go on behind the scenes.
        """
        worker = get_worker_info()
        if worker is None:
            return _in_time(read, path, self.seconds) if self.seconds > 0 else read()
        if worker.id >= len(self._reads):  # a DataLoader that was not made by `atfr.data.loader`
            return read()
        self._reads[worker.id] = torch.tensor([number, time.monotonic()], dtype=torch.float64)
        try:
            return read()
        finally:
            self._reads[worker.id, 0] = _NOTHING

    def under_way(self) -> list[tuple[int, float]]:
        """What the workers read at this moment: (number of the video, seconds so far), the longest first."""
        reads = [(int(number), time.monotonic() - since) for number, since in self._reads.tolist() if number != _NOTHING]
        return sorted(reads, key=lambda item: -item[1])


def _in_time(read: Callable[[], T], path: str, seconds: float) -> T:
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(read())
        except BaseException as error:  # whatever it is, it belongs to the caller
            errors.append(error)

    # A daemon, so that a read that hangs cannot keep the program from ending.
    thread = threading.Thread(target=run, name=f"read {path}", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"cannot read {path}: no answer within {seconds:g} s, its decoder or its disk hangs; leave the file out or raise trainer.timeout_s")
    return results[0]
