"""Triton kernels that move frames between packed clips and rows with gaps, one launch each.

What stands in front of an operation over time (a ReLU) and behind it (batch norm in evaluation, a residual sum, a ReLU)
is computed while the frames are moved.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from atfr.models.packed.kernels.support import ceil_division, frames_of, new_frames, power_of_two

BLOCK = 2048  # elements that one program moves


@triton.jit
def _gather(x, index, forward, out, width, fill, RELU: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Copy one block of the frame that belongs into a slot; `width` elements a frame."""
    blocks = tl.cdiv(width, BLOCK)
    slot = (tl.program_id(0) // blocks).to(tl.int64)
    offsets = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < width
    source = tl.load(index + slot).to(tl.int64)
    value = tl.load(x + source * width + offsets, mask=inside & (source >= 0), other=fill)
    if RELU:  # NaN stays, as in torch
        value = tl.where((value <= 0) & (source >= 0), 0.0, value)
    if MASKED:
        value = tl.where(tl.load(forward + slot * width + offsets, mask=inside, other=1.0) <= 0, 0.0, value)
    tl.store(out + slot * width + offsets, value.to(out.dtype.element_ty), mask=inside)


def sums_in(dtype: torch.dtype) -> Any:
    """Return the type in which features of this type are summed."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def _run_gather(x: Tensor, index: Tensor, fill: float, *, relu: bool = False, forward: Tensor | None = None) -> Tensor:
    frames = frames_of(x)
    out = new_frames(x, len(index))
    width = frames[0].numel()
    block = power_of_two(width, BLOCK)
    with torch.cuda.device_of(x):
        _gather[(len(index) * ceil_division(width, block),)](
            frames, index, frames if forward is None else frames_of(forward), out, width, fill, RELU=relu, MASKED=forward is not None, BLOCK=block
        )
    return out


@torch.library.custom_op("atfr::gather_rows", mutates_args=(), schema="(Tensor x, Tensor index, Tensor inverse, float fill, bool relu) -> Tensor")
def gather_rows(x: Tensor, index: Tensor, inverse: Tensor, fill: float, relu: bool) -> Tensor:
    """Select frames: [1, C, M, H, W] -> [1, C, K, H, W] in channels-last memory.

    Args:
        index: [K] int64, the frame for each slot; -1: a frame of `fill`. No frame is selected twice.
        inverse: [M] int64, the slot of each frame; -1 for one that is not selected. The backward pass gathers by it.
        relu: the frames go through a ReLU, `fill` does not.
    """
    return _run_gather(x, index, fill, relu=relu)


@torch.library.custom_op("atfr::gather_rows_backward", mutates_args=(), schema="(Tensor grad, Tensor inverse, Tensor? forward) -> Tensor")
def gather_rows_backward(grad: Tensor, inverse: Tensor, forward: Tensor | None) -> Tensor:
    """Return the gradient for the x of `gather_rows`: [1, C, K, H, W] -> [1, C, M, H, W].

    Args:
        forward: x, where the frames went through a ReLU.
    """
    return _run_gather(grad, inverse, 0.0, forward=forward)


@gather_rows.register_fake
def _(x: Tensor, index: Tensor, inverse: Tensor, fill: float, relu: bool) -> Tensor:
    return new_frames(x, len(index))


@gather_rows_backward.register_fake
def _(grad: Tensor, inverse: Tensor, forward: Tensor | None) -> Tensor:
    return new_frames(grad, len(inverse))


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, _, inverse, _, ctx.relu = inputs
    ctx.save_for_backward(inverse, *([x] if ctx.relu else []))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    inverse, *forward = ctx.saved_tensors
    return gather_rows_backward(grad, inverse, forward[0] if forward else None), None, None, None, None


gather_rows.register_autograd(_backward, setup_context=_save)


@triton.jit
def block_of(positions, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return a program's frame, its channels and which of them exist, and the offsets [BLOCK_P, BLOCK_C] in the frame and which of them exist."""
    parts, channel_blocks = tl.cdiv(positions, BLOCK_P), tl.cdiv(channels, BLOCK_C)
    frame = (tl.program_id(0) // (parts * channel_blocks)).to(tl.int64)
    position = (tl.program_id(0) // channel_blocks % parts) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    inside = (position < positions)[:, None] & known[None, :]
    return frame, channel, known, position[:, None] * channels + channel[None, :], inside


@triton.jit
def _finish(
    x, index, mean, variance, weight, bias, residual, out, positions, channels, epsilon,
    SELECT: tl.constexpr, AFFINE: tl.constexpr, ADD: tl.constexpr, RELU: tl.constexpr, SUMS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Normalise a block of positions x channels of one frame."""
    slot, channel, known, offsets, inside = block_of(positions, channels, BLOCK_P, BLOCK_C)
    source = tl.load(index + slot).to(tl.int64) if SELECT else slot
    scale = 1 / tl.sqrt(tl.load(variance + channel, mask=known, other=1.0).to(SUMS) + epsilon)
    shift = -tl.load(mean + channel, mask=known, other=0.0).to(SUMS)
    if AFFINE:
        scale *= tl.load(weight + channel, mask=known, other=0.0).to(SUMS)
    value = (tl.load(x + source * positions * channels + offsets, mask=inside, other=0.0).to(SUMS) + shift[None, :]) * scale[None, :]
    if AFFINE:
        value += tl.load(bias + channel, mask=known, other=0.0).to(SUMS)[None, :]
    if ADD:
        value += tl.load(residual + slot * positions * channels + offsets, mask=inside, other=0.0).to(SUMS)
    if RELU:
        value = tl.where(value <= 0, 0.0, value)
    tl.store(out + slot * positions * channels + offsets, value.to(out.dtype.element_ty), mask=inside)


@torch.library.custom_op(
    "atfr::normalise_frames",
    mutates_args=(),
    schema="(Tensor x, Tensor? index, Tensor mean, Tensor variance, Tensor? weight, Tensor? bias, Tensor? residual, float epsilon, bool relu) -> Tensor",
)
def normalise_frames(
    x: Tensor,
    index: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    epsilon: float,
    relu: bool,
) -> Tensor:
    """Select frames, and apply batch norm with given statistics, a residual sum and a ReLU: [1, C, M, H, W] -> [1, C, K, H, W].

    Without a backward pass. Sums are in float32 at least, and rounded once.

    Args:
        index: [K] int64, the frames to select; None: all.
        mean, variance, weight, bias: [C], those of batch norm; weight and bias are both given or both None.
        residual: [1, C, K, H, W], to be added.
        relu: a ReLU follows.
    """
    frames, count = frames_of(x), x.shape[2] if index is None else len(index)
    out = new_frames(x, count)
    positions, channels = x.shape[3] * x.shape[4], x.shape[1]
    block_c = power_of_two(channels, 128)
    block_p = power_of_two(positions, BLOCK // block_c)
    with torch.cuda.device_of(x):
        _finish[(count * ceil_division(positions, block_p) * ceil_division(channels, block_c),)](
            frames, frames if index is None else index, mean, variance, mean if weight is None else weight, mean if bias is None else bias,
            frames if residual is None else frames_of(residual), out, positions, channels, epsilon,
            SELECT=index is not None, AFFINE=weight is not None, ADD=residual is not None, RELU=relu,
            SUMS=sums_in(x.dtype), BLOCK_P=block_p, BLOCK_C=block_c,
        )  # fmt: skip
    return out


@normalise_frames.register_fake
def _(x: Tensor, index: Tensor | None, *parameters: Any) -> Tensor:
    return new_frames(x, x.shape[2] if index is None else len(index))


@triton.jit
def _add_relu(x, y, out, size, SUMS: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    value = tl.load(x + offsets, mask=inside).to(SUMS) + tl.load(y + offsets, mask=inside).to(SUMS)
    tl.store(out + offsets, tl.where(value <= 0, 0.0, value).to(out.dtype.element_ty), mask=inside)


@torch.library.custom_op("atfr::add_relu", mutates_args=(), schema="(Tensor x, Tensor y) -> Tensor")
def add_relu(x: Tensor, y: Tensor) -> Tensor:
    """Compute relu(x + y) of packed features [1, C, M, H, W] of one type, in channels-last memory."""
    frames, out = frames_of(x), new_frames(x, x.shape[2])
    with torch.cuda.device_of(x):
        _add_relu[(ceil_division(frames.numel(), BLOCK),)](frames, frames_of(y), out, frames.numel(), SUMS=sums_in(x.dtype), BLOCK=BLOCK)
    return out


@add_relu.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    return new_frames(x, x.shape[2])


def _save_output(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(output)


def _add_relu_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    grad = torch.ops.aten.threshold_backward(grad, ctx.saved_tensors[0], 0)
    return grad, grad


add_relu.register_autograd(_add_relu_backward, setup_context=_save_output)
