"""Explain loader errors caused by too little shared memory or too few file descriptors."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable, Iterator

_SHARED = "/dev/shm"
_OUT_OF_MEMORY = ("shared memory", "Bus error", "No space left on device")
_OUT_OF_FILES = ("Too many open files", "ancdata")
_MB = 1e6


def shortage(error: Exception, *, workers: int, needed: Callable[[], int] | None = None) -> str | None:
    """Return a one-line explanation with the remedy, or None for other errors.

    `needed` gives the number of bytes that the batches under way take in shared memory, where that is known.
    """
    text = "\n".join(_last_lines(error))
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


def _last_lines(error: BaseException | None) -> Iterator[str]:
    """Yield the last line of an error and of those that led to it: the text of a worker's error is its whole traceback.

    A worker that the kernel killed "exited unexpectedly"; only the cause names the signal.
    """
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield (str(error).splitlines() or [""])[-1]
        error = error.__cause__ or error.__context__


def _size() -> str:
    try:
        usage = shutil.disk_usage(_SHARED)
    except OSError:
        return "its size is not known"
    return f"{_SHARED} has {usage.total / _MB:.0f} MB, {usage.free / _MB:.0f} MB of them free"
