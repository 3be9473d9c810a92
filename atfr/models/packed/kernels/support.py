"""Where Triton kernels run, and what their launches share."""

from __future__ import annotations

import logging
from typing import Sequence

import torch
from torch import Tensor

log = logging.getLogger(__name__)

CAPABILITY = (7, 5)  # of the oldest GPUs that Triton compiles for

_RUNS: dict[int | None, bool] = {}  # by the index of a GPU; a plain dictionary, which torch.compile can read


def triton_runs(device: torch.device) -> bool:
    """Return whether Triton kernels run on this device; why they do not run on a GPU is logged once."""
    if device.type != "cuda":
        return False
    if not torch.cuda.is_available():  # fake tensors
        return False
    if device.index not in _RUNS:
        reason = _obstacle(device)
        if reason is not None and False not in _RUNS.values():
            log.warning("networks run without Triton kernels, and slower: %s", reason)
        _RUNS[device.index] = reason is None
    return _RUNS[device.index]


def _obstacle(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "they were not tested on AMD GPUs"
    if (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}, and Triton needs {CAPABILITY[0]}.{CAPABILITY[1]}"
    try:
        import triton  # noqa: F401
    except Exception as error:  # of whatever type its libraries raise
        return f"Triton cannot be imported ({error})"
    try:
        _run_first_kernel(device)
    except Exception as error:  # no C compiler, no headers of Python, a GPU that is too new, a cache that cannot be written
        what = (str(error).strip().splitlines() or [""])[0][:200]
        return f"Triton's first kernel failed ({type(error).__name__}: {what}); Triton needs a C compiler, the headers of Python and a GPU that it knows"
    return None


def _run_first_kernel(device: torch.device) -> None:
    from atfr.models.packed.kernels.rows import add_relu  # which needs Triton

    one = torch.ones(1, 1, 1, 1, 1, device=device)
    if (found := add_relu(one, one).item()) != 2:
        raise ArithmeticError(f"it found {found} for 1 + 1")


def frames_of(x: Tensor) -> Tensor:
    """Return [1, C, M, H, W] as frames [M, H, W, C] in contiguous memory; a copy only from another memory format than channels-last."""
    return x[0].permute(1, 2, 3, 0).contiguous()


def new_frames(like: Tensor, frames: int) -> Tensor:
    """Allocate [1, C, frames, H, W] in channels-last memory, with the other sizes and the type of `like` [1, C, M, H, W]."""
    _, channels, _, height, width = like.shape
    return empty_frames(like, (1, frames, height, width, channels))


def empty_frames(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Allocate frames of this shape [N, T, H, W, C], of the type of `like`: [N, C, T, H, W] in channels-last memory."""
    return like.new_empty(shape).permute(0, 4, 1, 2, 3)


def power_of_two(size: int, most: int) -> int:
    """Return the least power of two that is not below `size`, and at most `most`."""
    return min(1 << max(size - 1, 0).bit_length(), most)


def ceil_division(size: int, block: int) -> int:
    """Return how many blocks hold `size` elements. Triton's own function takes 5 us on the host, half a launch."""
    return -(-size // block)
