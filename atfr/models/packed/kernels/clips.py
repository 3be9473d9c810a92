"""Triton kernels for sums over all features of each clip, and for values that all features of a clip share.

Sums are in float32 at least, in an order that depends on the shapes alone: no atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from atfr.models.packed.kernels.rows import block_of, sums_in
from atfr.models.packed.kernels.support import ceil_division, empty_frames, frames_of, new_frames, power_of_two

BLOCK = 2048  # elements that one program loads at once


@triton.jit
def _frame_sums(x, y, out, positions, channels, PRODUCT: tl.constexpr, SUMS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sum one frame's positions, for a block of channels."""
    blocks = tl.cdiv(channels, BLOCK_C)
    frame = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    first = frame * positions * channels
    total = tl.zeros((BLOCK_P, BLOCK_C), dtype=SUMS)
    for start in range(0, positions, BLOCK_P):
        position = start + tl.arange(0, BLOCK_P)
        inside = (position < positions)[:, None] & known[None, :]
        offsets = first + position[:, None] * channels + channel[None, :]
        value = tl.load(x + offsets, mask=inside, other=0.0).to(SUMS)
        if PRODUCT:
            value *= tl.load(y + offsets, mask=inside, other=0.0).to(SUMS)
        total += value
    tl.store(out + frame * channels + channel, tl.sum(total, axis=0), mask=known)


@triton.jit
def _clip_sums(frames, starts, out, positions, channels, MEAN: tl.constexpr, SUMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sum one clip's frames, for a block of channels."""
    blocks = tl.cdiv(channels, BLOCK_C)
    clip = tl.program_id(0) // blocks
    channel = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    first, end = tl.load(starts + clip), tl.load(starts + clip + 1)
    total = tl.zeros((BLOCK_M, BLOCK_C), dtype=SUMS)
    for start in range(first, end, BLOCK_M):
        frame = start + tl.arange(0, BLOCK_M)
        inside = (frame < end)[:, None] & known[None, :]
        total += tl.load(frames + frame[:, None] * channels + channel[None, :], mask=inside, other=0.0)
    value = tl.sum(total, axis=0)
    if MEAN:
        value /= ((end - first) * positions).to(SUMS)
    tl.store(out + clip * channels + channel, value.to(out.dtype.element_ty), mask=known)


@triton.jit
def _spread(
    x, values, owner, starts, out, positions, channels,
    PRODUCT: tl.constexpr, SUMS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Multiply a block of one frame by its clip's values; or without PRODUCT write them, divided by the clip's positions."""
    frame, channel, known, offsets, inside = block_of(positions, channels, BLOCK_P, BLOCK_C)
    offsets += frame * positions * channels
    clip = tl.load(owner + frame)
    value = tl.load(values + clip * channels + channel, mask=known, other=0.0).to(SUMS)
    if PRODUCT:
        result = tl.load(x + offsets, mask=inside, other=0.0).to(SUMS) * value[None, :]
    else:
        value /= ((tl.load(starts + clip + 1) - tl.load(starts + clip)) * positions).to(SUMS)
        result = tl.zeros((BLOCK_P, BLOCK_C), dtype=SUMS) + value[None, :]
    tl.store(out + offsets, result.to(out.dtype.element_ty), mask=inside)


def _run_sums(x: Tensor, y: Tensor | None, starts: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum x, or x y, over each clip (x y), or average it (x): [1, C, M, H, W] -> [N, C]."""
    frames, positions, channels = frames_of(x), x.shape[3] * x.shape[4], x.shape[1]
    sums = torch.empty((x.shape[2], channels), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    out = torch.empty((len(starts) - 1, channels), dtype=dtype, device=x.device)
    block_c = power_of_two(channels, 64)
    block_p = power_of_two(positions, BLOCK // block_c)
    blocks = ceil_division(channels, block_c)
    options = {"SUMS": sums_in(x.dtype), "BLOCK_C": block_c}
    with torch.cuda.device_of(x):
        _frame_sums[(len(sums) * blocks,)](
            frames, frames if y is None else frames_of(y), sums, positions, channels, PRODUCT=y is not None, BLOCK_P=block_p, **options
        )
        _clip_sums[(len(out) * blocks,)](sums, starts, out, positions, channels, MEAN=y is None, BLOCK_M=8, **options)
    return out


def _run_spread(x: Tensor | None, values: Tensor, owner: Tensor, starts: Tensor, out: Tensor) -> Tensor:
    positions, channels = out.shape[3] * out.shape[4], out.shape[1]
    block_c = power_of_two(channels, 64)
    block_p = power_of_two(positions, BLOCK // block_c)
    with torch.cuda.device_of(out):
        _spread[(out.shape[2] * ceil_division(positions, block_p) * ceil_division(channels, block_c),)](
            out if x is None else frames_of(x), values.contiguous(), owner, starts, out, positions, channels,
            PRODUCT=x is not None, SUMS=sums_in(out.dtype), BLOCK_P=block_p, BLOCK_C=block_c,
        )  # fmt: skip
    return out


@torch.library.custom_op("atfr::clip_means", mutates_args=(), schema="(Tensor x, Tensor owner, Tensor starts) -> Tensor")
def clip_means(x: Tensor, owner: Tensor, starts: Tensor) -> Tensor:
    """Average each clip over time and space, in two launches: [1, C, M, H, W] -> [N, C], in the type of x.

    Args:
        owner: [M] int64, the clip of each frame.
        starts: [N + 1] int64, the first frame of each clip, then M.
    """
    return _run_sums(x, None, starts, x.dtype)


@torch.library.custom_op("atfr::clip_means_backward", mutates_args=(), schema="(Tensor grad, Tensor owner, Tensor starts, int height, int width) -> Tensor")
def clip_means_backward(grad: Tensor, owner: Tensor, starts: Tensor, height: int, width: int) -> Tensor:
    """Give each position of a clip its share of the mean's gradient: [N, C] -> [1, C, M, H, W]."""
    return _run_spread(None, grad, owner, starts, _empty(grad, owner, height, width))


@torch.library.custom_op("atfr::scale_clips", mutates_args=(), schema="(Tensor x, Tensor scale, Tensor owner, Tensor starts) -> Tensor")
def scale_clips(x: Tensor, scale: Tensor, owner: Tensor, starts: Tensor) -> Tensor:
    """Multiply all features of a clip by its scale: x [1, C, M, H, W], scale [N, C] -> [1, C, M, H, W], in the type of x.

    For `owner` and `starts` see `clip_means`.
    """
    return _run_spread(x, scale, owner, starts, new_frames(x, x.shape[2]))


@torch.library.custom_op("atfr::clip_products", mutates_args=(), schema="(Tensor x, Tensor y, Tensor starts, ScalarType dtype) -> Tensor")
def clip_products(x: Tensor, y: Tensor, starts: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum x y over each clip, in two launches: [1, C, M, H, W] twice -> [N, C]."""
    return _run_sums(x, y, starts, dtype)


def _empty(values: Tensor, owner: Tensor, height: int, width: int) -> Tensor:
    return empty_frames(values, (1, len(owner), height, width, values.shape[1]))


@clip_means.register_fake
def _(x: Tensor, owner: Tensor, starts: Tensor) -> Tensor:
    return x.new_empty((len(starts) - 1, x.shape[1]))


@clip_means_backward.register_fake
def _(grad: Tensor, owner: Tensor, starts: Tensor, height: int, width: int) -> Tensor:
    return _empty(grad, owner, height, width)


@scale_clips.register_fake
def _(x: Tensor, scale: Tensor, owner: Tensor, starts: Tensor) -> Tensor:
    return new_frames(x, x.shape[2])


@clip_products.register_fake
def _(x: Tensor, y: Tensor, starts: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty((len(starts) - 1, x.shape[1]), dtype=dtype)


def _save_means(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, owner, starts = inputs
    ctx.size = x.shape[3:]
    ctx.save_for_backward(owner, starts)


def _backward_means(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return clip_means_backward(grad, *ctx.saved_tensors, *ctx.size), None, None


def _save_scaled(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_scaled(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, scale, owner, starts = ctx.saved_tensors
    for_x = scale_clips(grad, scale, owner, starts) if ctx.needs_input_grad[0] else None
    for_scale = clip_products(grad, x, starts, scale.dtype) if ctx.needs_input_grad[1] else None
    return for_x, for_scale, None, None


clip_means.register_autograd(_backward_means, setup_context=_save_means)
scale_clips.register_autograd(_backward_scaled, setup_context=_save_scaled)
