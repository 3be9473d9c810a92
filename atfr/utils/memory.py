"""How much memory this process uses."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch


def memory_in_use(device: torch.device) -> dict[str, float]:
    """Return `memory_gib`: on a GPU the peak of the tensors there, on a CPU the resident memory of this process; empty if the system does not say."""
    if device.type == "cuda":
        return {"memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return {}
    return {"memory_gib": pages * mmap.PAGESIZE / 2**30}
