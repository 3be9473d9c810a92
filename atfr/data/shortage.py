"""Explain loader errors that are caused by too little shared memory or too few file descriptors."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable, Iterator

_SHARED = "/dev/shm"
_OUT_OF_MEMORY = ("shared memory", "Bus error", "No space left on device")
_OUT_OF_FILES = ("Too many open files", "ancdata")
_MB = 1e6


def explain_shortage(error: Exception, *, workers: int, needed: Callable[[], int] | None = None) -> str | None:
    """Return a one-line explanation with the remedy, or None for any other error.

    `needed` returns the bytes of shared memory that one process's batches take, if that is known.
    """
    text = "\n".join(_last_lines(error))
    # File descriptors first: some of their messages also mention shared memory.
    if any(sign in text for sign in _OUT_OF_FILES):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return (
            f"trainer.workers={workers}: the loader ran out of file descriptors (the limit is {limit}); raise it with `ulimit -n 65536`"
            " (docker run --ulimit nofile=65536), or lower trainer.workers"
        )
    if any(sign in text for sign in _OUT_OF_MEMORY):
        batches = f"; the batches of one process take about {needed() / _MB:.0f} MB" if needed else ""
        return (
            f"trainer.workers={workers}: the loader ran out of shared memory ({_size()}{batches});"
            " make it larger (docker run --shm-size=8g), lower trainer.workers, or set trainer.workers=0"
        )
    return None


def _last_lines(error: BaseException | None) -> Iterator[str]:
    """Yield the last line of an error and of each of its causes.

    The text of a worker's error is a whole traceback. If the kernel killed the worker, only the cause names the signal.
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
        return "its size is unknown"
    return f"{_SHARED} has {usage.total / _MB:.0f} MB, {usage.free / _MB:.0f} MB free"
