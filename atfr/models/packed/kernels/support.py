"""Where Triton kernels run, and what their launches share."""

from __future__ import annotations

import functools
import importlib.util
import logging
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

log = logging.getLogger(__name__)

CAPABILITY = (7, 5)  # of the oldest GPUs that Triton compiles for


def triton_runs(device: torch.device) -> bool:
    """Return whether Triton kernels run on this device; for a GPU where they do not, log the reason once."""
    return device.type == "cuda" and _runs_on(device)


@functools.lru_cache(maxsize=None)
def _runs_on(device: torch.device) -> bool:
    if not torch.cuda.is_available():  # fake tensors
        return False
    if torch.version.hip is not None:
        reason = "they were not tested on AMD GPUs"
    elif importlib.util.find_spec("triton") is None:
        reason = "triton is not installed"
    elif (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        reason = f"they need a GPU of compute capability {_version(CAPABILITY)}, and {torch.cuda.get_device_name(device)} has {_version(found)}"
    else:
        return True
    log.warning("packed execution runs without Triton kernels, and slower: %s", reason)
    return False


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def launching_on(x: Tensor) -> AbstractContextManager:
    """Make the device of x the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def frames_of(x: Tensor) -> Tensor:
    """Return [1, C, M, H, W] as frames [M, H, W, C] in contiguous memory; a copy only from another memory format than channels-last."""
    return x[0].permute(1, 2, 3, 0).contiguous()


def new_frames(like: Tensor, frames: int) -> Tensor:
    """Allocate [1, C, frames, H, W] in channels-last memory, with the other sizes and the type of `like` [1, C, M, H, W]."""
    _, channels, _, height, width = like.shape
    return like.new_empty((1, frames, height, width, channels)).permute(0, 4, 1, 2, 3)


def power_of_two(size: int, most: int) -> int:
    """Return the least power of two that is not below `size`, and at most `most`."""
    return min(1 << max(size - 1, 0).bit_length(), most)
