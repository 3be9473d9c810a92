"""Keep what the CPU's large tensors free for the ones that follow."""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of mallopt(3)


def keep_freed_memory() -> bool:
    """Tell glibc not to hand freed memory back to the kernel; False where it is not glibc's.

    A video network's activations are larger than what glibc caches, so by default every one of
    them is mapped anew and its pages are zeroed by the kernel as they are first touched: half of
    the time of an X3D on two cores (`benchmarks/adaptive_speed.py --fresh-memory`).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        return bool(libc.mallopt(MMAP_MAX, 0)) and bool(libc.mallopt(TRIM_THRESHOLD, -1))
    except (OSError, AttributeError):
        return False
