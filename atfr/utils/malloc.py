"""What the CPU's allocator does with freed memory: keep it for the next tensor, or hand it back to the kernel."""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # of mallopt(3)


def keep_freed_memory() -> bool:
    """Tell glibc not to hand freed memory back to the kernel; False where it is not glibc's.

    A video network's activations are larger than what glibc caches, so by default every one of
    them is mapped anew and its pages are zeroed by the kernel as they are first touched: half of
    the time of an X3D on two cores (`benchmarks/adaptive_speed.py --fresh-memory`).
    """
    return _set(MMAP_MAX, 0) and _set(TRIM_THRESHOLD, -1)


def hand_back_freed_memory() -> bool:
    """Tell glibc to hand everything of 4 MiB or more back as it is freed; False where it is not glibc's.

    For a process that reads videos: each size of frame leaves holes that the next does not fit, and
    the threshold that glibc raises by itself keeps them all, so that a loader's worker grows for
    thousands of clips (`benchmarks/loader_speed.py`). Smaller things come and go with every frame:
    for these it keeps up to 64 MiB, since mapping them anew takes its time where decoding is quick.
    Undoes `keep_freed_memory`, which a forked process has from its parent.
    """
    return _set(MMAP_MAX, 65536) and _set(MMAP_THRESHOLD, 2**22) and _set(TRIM_THRESHOLD, 2**26)


def _set(parameter: int, value: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        return bool(ctypes.CDLL("libc.so.6").mallopt(parameter, value))
    except (OSError, AttributeError):
        return False
