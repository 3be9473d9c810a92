"""Errors that a DataLoader's workers end in where shared memory or file descriptors are short."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable

_SHARED = "/dev/shm"
_OUT_OF_MEMORY = ("shared memory", "Bus error", "No space left on device")
_OUT_OF_FILES = ("Too many open files", "ancdata")
_MB = 1e6


def shortage(error: Exception, *, workers: int, needed: Callable[[], int] | None = None) -> str | None:
    """Return in one line what is short and the way out, None for an error of another kind.

    `needed` gives the number of bytes that the batches under way take in shared memory, where that is known.
    """
    text = (str(error).splitlines() or [""])[-1]  # a worker's error comes as its whole traceback
    # First, since some messages about files mention shared memory, too.
    if any(sign in text for sign in _OUT_OF_FILES):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return (
            f"trainer.workers={workers}: the loader ran out of file descriptors (the limit is {limit}); raise it with `ulimit -n 65536`"
            " (docker run --ulimit nofile=65536), or lower trainer.workers"
        )
    if any(sign in text for sign in _OUT_OF_MEMORY):
        batches = f", where the batches of one process take about {needed() / _MB:.0f} MB" if needed else ""
        return (
            f"trainer.workers={workers}: the loader ran out of shared memory ({_size()}{batches});"
            " make it larger (docker run --shm-size=8g), lower trainer.workers, or set trainer.workers=0"
        )
    return None


def _size() -> str:
    try:
        usage = shutil.disk_usage(_SHARED)
    except OSError:
        return "its size is not known"
    return f"{_SHARED} has {usage.total / _MB:.0f} MB, {usage.free / _MB:.0f} MB of them free"
