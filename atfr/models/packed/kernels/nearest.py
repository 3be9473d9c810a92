"""A Triton kernel that finds the features of one packed tensor that are nearest in time to those of another one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from atfr.models.packed.kernels.support import power_of_two


@triton.jit
def _windows(times, owner, other_times, starts, out, factor, beyond, KERNEL: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr):
    """Find one feature's window: the nearest one of its clip, the first of equals, and its neighbours."""
    feature = tl.program_id(0)
    clip = tl.load(owner + feature)
    first, end = tl.load(starts + clip), tl.load(starts + clip + 1)
    time = tl.load(times + feature) * factor
    least, nearest = tl.full((), float("inf"), tl.float32), first
    for start in range(first, end, BLOCK):
        other = start + tl.arange(0, BLOCK)
        distance = tl.abs(time - tl.load(other_times + other, mask=other < end, other=float("inf")))
        here = tl.min(distance, axis=0)
        nearest = tl.where(here < least, start + tl.argmin(distance, axis=0), nearest)
        least = tl.minimum(here, least)
    place = tl.arange(0, BLOCK_K)
    slot = nearest + place - KERNEL // 2
    tl.store(out + feature * KERNEL + place, tl.where((slot >= first) & (slot < end), slot, beyond), mask=place < KERNEL)


@torch.library.custom_op(
    "atfr::nearest_windows",
    mutates_args=(),
    schema="(Tensor times, Tensor owner, Tensor other_times, Tensor starts, float factor, int kernel) -> Tensor",
)
def nearest_windows(times: Tensor, owner: Tensor, other_times: Tensor, starts: Tensor, factor: float, kernel: int) -> Tensor:
    """Return windows of `kernel` features, centred on the one nearest to each time: [M, kernel] int64.

    A window's places beyond the clip are M', the index behind the last one.

    Args:
        times, owner: [M] float32 and int64, the time and clip of each feature.
        other_times, starts: [M'] float32, the times of the features to choose from; [N + 1] int64, the first of each clip, then M'.
        factor: of `times`, in the unit of `other_times`.
    """
    out = torch.empty((len(times), kernel), dtype=torch.int64, device=times.device)
    with torch.cuda.device_of(times):
        _windows[(len(times),)](times, owner, other_times, starts, out, factor, len(other_times), KERNEL=kernel, BLOCK_K=power_of_two(kernel, 64), BLOCK=32)
    return out


@nearest_windows.register_fake
def _(times: Tensor, owner: Tensor, other_times: Tensor, starts: Tensor, factor: float, kernel: int) -> Tensor:
    return times.new_empty((len(times), kernel), dtype=torch.int64)
