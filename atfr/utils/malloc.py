"""Tell the CPU's allocator to keep freed memory for the next tensor, or to return it to the kernel."""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # of mallopt(3)


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory. Return False if the C library is not glibc.

    The activations of a video network are larger than what glibc caches. By default the kernel maps and zeroes
    each of them again, which takes half of the time of an X3D on two cores
    (`benchmarks/adaptive_speed.py --fresh-memory`).
    """
    return _set(MMAP_MAX, 0) and _set(TRIM_THRESHOLD, -1)


def return_freed_memory() -> bool:
    """Tell glibc to return freed blocks of 4 MiB or more to the kernel. Return False if the C library is not glibc.

    For processes that read videos. Frames of different sizes fragment the heap, and glibc raises its threshold by
    itself and keeps the holes, so a worker grows for thousands of clips (`benchmarks/loader_speed.py`). Smaller blocks
    come and go with every frame: up to 64 MiB of them are kept, because mapping them again is slow. This undoes
    `keep_freed_memory`, which a forked process inherits.
    """
    return _set(MMAP_MAX, 65536) and _set(MMAP_THRESHOLD, 2**22) and _set(TRIM_THRESHOLD, 2**26)


def _set(parameter: int, value: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        return bool(ctypes.CDLL("libc.so.6").mallopt(parameter, value))
    except (OSError, AttributeError):
        return False
