"""The Triton kernels of depthwise 3D convolutions, and their launches; see `depthwise` for the operations.

All tensors are frames [M, H, W, C]. A program computes a tile of positions of one frame for a block of channels. Sums are
float32 and in a fixed order, so that results are the same in each run. Whatever a mask hides is never read: padding, and
the frames of other clips. The channels are a constant of the kernel, so that the compiler knows how rows are aligned.
Offsets within a frame have 32 bits unless a frame is larger.
"""

from __future__ import annotations

from typing import Any, Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from atfr.models.packed.kernels.geometry import Geometry
from atfr.models.packed.kernels.support import ceil_division

BLOCKS = ((16, 64, 4), (32, 64, 4), (64, 32, 4), (16, 128, 4))  # (positions, channels, warps) that are tried
VARYING = ["frames", "M", "tiles_each"]  # arguments for whose values no kernel of their own is compiled: they change with each batch


@triton.jit
def _clip(bounds, slot, frames, PACKED: tl.constexpr):
    """Return the first and the end slot of the clip of a frame; without bounds each `frames` slots are a clip."""
    if PACKED:
        first = tl.load(bounds + 2 * slot)
        end = tl.load(bounds + 2 * slot + 1)
    else:
        first = slot // frames * frames
        end = first + frames
    return first, end


@triton.jit
def _output_taps(
    total, frame, taps, offsets, row, column, used, c, channel, H, W,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
):  # fmt: skip
    """Add the taps of one frame to the sums of `_output`."""
    for kh in tl.static_range(KH):
        line = frame + kh * W * C + offsets
        fits = used & (row + kh >= 0) & (row + kh < H)
        for kw in tl.static_range(KW):
            read = fits & (column + kw >= 0) & (column + kw < W)
            value = tl.load(line + kw * C, mask=read[:, None] & channel[None, :], other=0)
            weight = tl.load(taps + (kh * KW + kw) * C + c, mask=channel, other=0)
            total += value.to(tl.float32) * weight.to(tl.float32)[None, :]
    return total


@triton.jit(do_not_specialize=VARYING)
def _output(
    x, taps, bias, bounds, out, frames, H, W, OH, OW,
    C: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    PACKED: tl.constexpr, BIAS: tl.constexpr, OFFSET: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x [M, H, W, C], taps [KT KH KW, C] -> out [M, OH, OW, C]."""
    tiles = tl.cdiv(OH * OW, BLOCK_P)
    slot = tl.program_id(0) // tiles
    p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside, channel = p < OH * OW, c < C
    row, column = p // OW * SH - PH, p % OW * SW - PW  # of the first tap
    offsets = ((row.to(OFFSET) * W + column) * C)[:, None] + c[None, :]
    first, end = _clip(bounds, slot, frames, PACKED)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    if KH * KW > 1:  # a loop over the clip's own frames keeps registers few
        for kt in range(tl.maximum(first - slot + KT // 2, 0), tl.minimum(end - slot + KT // 2, KT)):
            frame = x + (slot + kt - KT // 2).to(tl.int64) * H * W * C
            total = _output_taps(total, frame, taps + kt * KH * KW * C, offsets, row, column, inside, c, channel, H, W, C, KH, KW)
    else:
        for kt in tl.static_range(KT):
            source = slot + kt - KT // 2
            used = inside & (source >= first) & (source < end)
            total = _output_taps(total, x + source.to(tl.int64) * H * W * C, taps + kt * C, offsets, row, column, used, c, channel, H, W, C, KH, KW)
    if BIAS:
        total += tl.load(bias + c, mask=channel, other=0).to(x.dtype.element_ty).to(tl.float32)[None, :]
    place = out + slot.to(tl.int64) * OH * OW * C + (p.to(OFFSET) * C)[:, None] + c[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=inside[:, None] & channel[None, :])


@triton.jit
def _input_taps(
    total, frame, taps, offsets, oh, ow, first_kh, first_kw, used, c, channel, OH, OW,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
):  # fmt: skip
    """Add the taps of one frame to the sums of `_input_gradient`."""
    for i in tl.static_range((KH + SH - 1) // SH):
        kh = first_kh + i * SH
        line = frame - i * OW * C + offsets
        fits = used & (kh < KH) & (oh >= i) & (oh - i < OH)
        for j in tl.static_range((KW + SW - 1) // SW):
            kw = first_kw + j * SW
            read = fits & (kw < KW) & (ow >= j) & (ow - j < OW)
            value = tl.load(line - j * C, mask=read[:, None] & channel[None, :], other=0)
            weight = tl.load(taps + (kh * KW + kw) * C + c, mask=channel & (kh < KH) & (kw < KW), other=0)
            total += value.to(tl.float32) * weight.to(tl.float32)[None, :]
    return total


@triton.jit(do_not_specialize=VARYING)
def _input_gradient(
    grad, taps, bounds, out, frames, H, W, OH, OW,
    C: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    PACKED: tl.constexpr, OFFSET: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad [M, OH, OW, C], taps [KT KH KW, C] -> out [M, H, W, C].

    The positions of a program have the same rest modulo the strides, so that the same taps reach them. Without strides
    this is the convolution with flipped taps.
    """
    height, width = tl.cdiv(H, SH), tl.cdiv(W, SW)
    tiles = tl.cdiv(height * width, BLOCK_P)
    slot = tl.program_id(0) // (tiles * SH * SW)
    rest = tl.program_id(0) // tiles % (SH * SW)
    p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row, column, channel = p // width * SH + rest // SW, p % width * SW + rest % SW, c < C
    inside = (row < H) & (column < W)
    first_kh, first_kw = (rest // SW + PH) % SH, (rest % SW + PW) % SW
    oh, ow = (row + PH - first_kh) // SH, (column + PW - first_kw) // SW  # the output that reads it with the first of these taps
    offsets = ((oh.to(OFFSET) * OW + ow) * C)[:, None] + c[None, :]
    first, end = _clip(bounds, slot, frames, PACKED)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    if KH * KW > 1:
        for kt in range(tl.maximum(slot + KT // 2 - end + 1, 0), tl.minimum(slot + KT // 2 - first + 1, KT)):
            frame = grad + (slot + KT // 2 - kt).to(tl.int64) * OH * OW * C
            total = _input_taps(
                total, frame, taps + kt * KH * KW * C, offsets, oh, ow, first_kh, first_kw, inside, c, channel, OH, OW, C, KH, KW, SH, SW
            )
    else:
        for kt in tl.static_range(KT):
            source = slot + KT // 2 - kt
            used = inside & (source >= first) & (source < end)
            frame = grad + source.to(tl.int64) * OH * OW * C
            total = _input_taps(total, frame, taps + kt * C, offsets, oh, ow, first_kh, first_kw, used, c, channel, OH, OW, C, KH, KW, SH, SW)
    place = out + slot.to(tl.int64) * H * W * C + ((row.to(OFFSET) * W + column) * C)[:, None] + c[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=inside[:, None] & channel[None, :])


@triton.jit
def _add_row(a, b, c, upstream, place, fits, column, channel, W, C: tl.constexpr, COLUMNS: tl.constexpr):
    """Add the products of up to three neighbouring taps of a row to their sums."""
    read = (fits & (column >= 0) & (column < W))[:, None] & channel[None, :]
    a += upstream * tl.load(place, mask=read, other=0).to(tl.float32)
    if COLUMNS > 1:
        read = (fits & (column >= -1) & (column < W - 1))[:, None] & channel[None, :]
        b += upstream * tl.load(place + C, mask=read, other=0).to(tl.float32)
    if COLUMNS > 2:
        read = (fits & (column >= -2) & (column < W - 2))[:, None] & channel[None, :]
        c += upstream * tl.load(place + 2 * C, mask=read, other=0).to(tl.float32)
    return a, b, c


@triton.jit
def _store_row(out, a, b, c, kw, keep, KW: tl.constexpr, COLUMNS: tl.constexpr):
    tl.store(out + kw, tl.sum(a, axis=0), mask=keep)
    if COLUMNS > 1:
        tl.store(out + kw + 1, tl.sum(b, axis=0), mask=keep & (kw + 1 < KW))
    if COLUMNS > 2:
        tl.store(out + kw + 2, tl.sum(c, axis=0), mask=keep & (kw + 2 < KW))


@triton.jit(do_not_specialize=VARYING)
def _weight_gradient(
    grad, x, bounds, out, frames, M, tiles_each, H, W, OH, OW,
    C: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    PACKED: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad [M, OH, OW, C], x [M, H, W, C] -> out [programs, C, KT KH KW] float32.

    A program sums `tiles_each` tiles for up to 3 x 3 taps of one frame. It reads each gradient once for all of them.
    """
    groups: tl.constexpr = ((KH + ROWS - 1) // ROWS) * ((KW + COLUMNS - 1) // COLUMNS)
    kt, group = tl.program_id(2) // groups, tl.program_id(2) % groups
    kh, kw = group // ((KW + COLUMNS - 1) // COLUMNS) * ROWS, group % ((KW + COLUMNS - 1) // COLUMNS) * COLUMNS
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel = c < C
    tiles = tl.cdiv(OH * OW, BLOCK_P)
    zero = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    a0, a1, a2, b0, b1, b2, c0, c1, c2 = zero, zero, zero, zero, zero, zero, zero, zero, zero
    for i in range(tiles_each):
        tile = tl.program_id(0) * tiles_each + i
        slot = tile // tiles
        p = tile % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
        exists = slot < M
        slot = tl.minimum(slot, M - 1)  # whose bounds can be read
        first, end = _clip(bounds, slot, frames, PACKED)
        source = slot + kt - KT // 2
        used = (p < OH * OW) & exists & (source >= first) & (source < end)
        row, column = p // OW * SH - PH + kh, p % OW * SW - PW + kw
        upstream = tl.load(
            grad + slot.to(tl.int64) * OH * OW * C + (p.to(OFFSET) * C)[:, None] + c[None, :], mask=used[:, None] & channel[None, :], other=0
        ).to(tl.float32)
        place = x + source.to(tl.int64) * H * W * C + ((row.to(OFFSET) * W + column) * C)[:, None] + c[None, :]
        a0, a1, a2 = _add_row(a0, a1, a2, upstream, place, used & (row >= 0) & (row < H), column, channel, W, C, COLUMNS)
        if ROWS > 1:
            b0, b1, b2 = _add_row(b0, b1, b2, upstream, place + W * C, used & (row + 1 >= 0) & (row + 1 < H), column, channel, W, C, COLUMNS)
        if ROWS > 2:
            c0, c1, c2 = _add_row(c0, c1, c2, upstream, place + 2 * W * C, used & (row + 2 >= 0) & (row + 2 < H), column, channel, W, C, COLUMNS)
    sums = out + (tl.program_id(0) * C + c).to(tl.int64) * (KT * KH * KW) + (kt * KH + kh) * KW
    _store_row(sums, a0, a1, a2, kw, channel, KW, COLUMNS)
    if ROWS > 1:
        _store_row(sums + KW, b0, b1, b2, kw, channel & (kh + 1 < KH), KW, COLUMNS)
    if ROWS > 2:
        _store_row(sums + 2 * KW, c0, c1, c2, kw, channel & (kh + 2 < KH), KW, COLUMNS)


COMPILED = isinstance(_output, triton.JITFunction)  # False in Triton's interpreter, which is for tests
GRADIENT_PROGRAMS = 2048 if COMPILED else 12  # of the weight gradient: a few for each multiprocessor of the largest GPUs


def _fitting(configs: list[triton.Config], arguments: dict[str, Any], **constants: Any) -> list[triton.Config]:
    """Return the configs that do not waste half of a block of channels or of positions, and one for frames that fit into a block.

    Each one that is tried has to be compiled.
    """
    for block, size in (("BLOCK_C", constants["C"]), ("BLOCK_P", arguments["OH"] * arguments["OW"])):
        most = max(2 * size - 1, min(config.kwargs[block] for config in configs))
        configs = [config for config in configs if config.kwargs[block] <= most]
    return configs[:1] if arguments["OH"] * arguments["OW"] <= configs[0].kwargs["BLOCK_P"] else configs


def _milliseconds(call: Callable[[], None], quantiles: Sequence[float]) -> list[float]:
    """Time a kernel in 25 ms, a fifth of what Triton takes, since a network has some fifty to time in its first step."""
    return triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)


def _tuned(kernel: Callable) -> Any:
    """Choose the blocks of a kernel in its first call for a size of frames. The number of frames differs from batch to batch.

    The choice is kept in Triton's cache, for the next process; GPUs of one architecture share it there.
    """
    configs = [triton.Config({"BLOCK_P": positions, "BLOCK_C": channels}, num_warps=warps) for positions, channels, warps in BLOCKS]
    key = ["C", "H", "W", "KT", "KH", "KW", "SH", "SW"]
    return triton.autotune(configs, key=key, prune_configs_by={"early_config_prune": _fitting}, do_bench=_milliseconds, cache_results=True)(kernel)


def _interpreted(channels: int) -> dict[str, int]:
    """Return the blocks of the interpreter, which chooses none: few of them."""
    return {} if COMPILED else {"BLOCK_P": 16, "BLOCK_C": min(triton.next_power_of_2(channels), 256)}


_OUTPUT: Any = _tuned(_output) if COMPILED else _output
_INPUT_GRADIENT: Any = _tuned(_input_gradient) if COMPILED else _input_gradient


def output(x: Tensor, taps: Tensor, bias: Tensor | None, bounds: Tensor | None, out: Tensor, geometry: Geometry) -> None:
    """Convolve frames x [N, T, H, W, C] into out [N, T, OH, OW, C]; taps is [KT KH KW, C]."""
    sizes, constants = _arguments(x, out, bounds, geometry)
    frames, places = x.shape[0] * x.shape[1], out.shape[2] * out.shape[3]

    def grid(blocks: dict[str, int]) -> tuple[int, int]:
        return frames * ceil_division(places, blocks["BLOCK_P"]), ceil_division(x.shape[4], blocks["BLOCK_C"])

    with torch.cuda.device_of(x):
        _OUTPUT[grid](x, taps, bias, bounds, out, *sizes, BIAS=bias is not None, **constants, **_interpreted(x.shape[4]))


def input_gradient(gradient: Tensor, taps: Tensor, bounds: Tensor | None, out: Tensor, geometry: Geometry) -> None:
    """Compute the gradient of x into out [N, T, H, W, C], from that of the output [N, T, OH, OW, C]."""
    sizes, constants = _arguments(out, gradient, bounds, geometry)
    frames = out.shape[0] * out.shape[1]
    (sh, sw), (height, width) = geometry.stride, out.shape[2:4]
    places = ceil_division(height, sh) * ceil_division(width, sw)

    def grid(blocks: dict[str, int]) -> tuple[int, int]:
        return frames * sh * sw * ceil_division(places, blocks["BLOCK_P"]), ceil_division(out.shape[4], blocks["BLOCK_C"])

    with torch.cuda.device_of(out):
        _INPUT_GRADIENT[grid](gradient, taps, bounds, out, *sizes, **constants, **_interpreted(out.shape[4]))


def weight_gradient(gradient: Tensor, x: Tensor, bounds: Tensor | None, geometry: Geometry) -> Tensor:
    """Return the gradient of the weight, [C, KT KH KW] float32.

    The blocks are not tuned: they would change the order of the sums, and so the result from run to run.
    """
    (*sizes, height, width, out_height, out_width), constants = _arguments(x, gradient, bounds, geometry)
    frames, channels = x.shape[0] * x.shape[1], x.shape[4]
    time, rows, columns = geometry.kernel
    rows_each, columns_each = min(rows, 3), min(columns, 3)
    block_c = 64 if channels > 32 else 32
    block_p = (1024 if rows_each * columns_each > 3 else 2048) // block_c  # 8 or 16 sums of each tap in a thread
    size = {"BLOCK_P": block_p, "BLOCK_C": block_c} | _interpreted(channels)
    blocks = ceil_division(channels, size["BLOCK_C"])
    groups = time * ceil_division(rows, rows_each) * ceil_division(columns, columns_each)
    tiles = frames * ceil_division(out_height * out_width, size["BLOCK_P"])
    tiles_each = ceil_division(tiles, max(GRADIENT_PROGRAMS // (blocks * groups), 1))
    partial = x.new_empty((ceil_division(tiles, tiles_each), channels, geometry.taps), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _weight_gradient[len(partial), blocks, groups](
            gradient, x, bounds, partial, *sizes, frames, tiles_each, height, width, out_height, out_width,
            ROWS=rows_each, COLUMNS=columns_each, **constants, **size,
        )  # fmt: skip
    return partial.sum(0)


def _arguments(x: Tensor, out: Tensor, bounds: Tensor | None, geometry: Geometry) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Return the sizes `frames, H, W, OH, OW` and the constants of a kernel, for x [N, T, H, W, C] and out [N, T, OH, OW, C]."""
    (kt, kh, kw), (sh, sw), (ph, pw) = geometry
    _, frames, height, width, channels = x.shape
    large = max(x[0, 0].numel(), out[0, 0].numel()) + channels * width * kh >= 2**31
    constants = {
        "C": channels, "KT": kt, "KH": kh, "KW": kw, "SH": sh, "SW": sw, "PH": ph, "PW": pw,
        "PACKED": bounds is not None, "OFFSET": tl.int64 if large else tl.int32,
    }  # fmt: skip
    return (frames, height, width, *out.shape[2:4]), constants
