"""The cut of `partition.py` as one Triton kernel, from the embeddings to the weights: one program a clip.

Import this module only where `packed.kernels.support.triton_runs` allows it: it needs Triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Cut(NamedTuple):
    """The cut of each clip, with the mean kernel's weights."""

    weights: Tensor  # [N, B, T] float32, the kept bins first; NaN for clips that cannot be cut
    lengths: Tensor  # [N] int64: B'
    report: Tensor  # [N] int64: B'; 0 if z holds a NaN or an infinity, -1 if the width is a NaN
    times: Tensor  # [N, B] float32: the mean time of each bin's frames, 0 for empty bins
    bins: Tensor  # [N, T] int64: the bin of each frame; padding is in the last bin
    least: Tensor  # [N, B] float32: E_k, infinite for more bins than frames


def cut(
    z: Tensor,
    *,
    width: Tensor,
    frames: Tensor | None = None,
    times: Tensor | None = None,
    num_bins: int,
    min_bins: int = 1,
    cost_exponent: float = 0.0,
    middle: bool = False,
) -> Cut:
    """Cut clips into contiguous bins like `partition.partition_bins`, and weight the frames of each bin equally.

    Args:
        z: [N, T, D] float32, T at most `partition.MOST_FRAMES`; anything in padding.
        width: a scalar.
        frames: [N] int64, how many of the T frames of each clip exist; None: all.
        times: [N, T] float32, the time of each frame; None: its index.
        middle: keep the middle frame of each bin instead of the mean.
    """
    return Cut(*_cut(z.detach().contiguous(), width.detach(), frames, times, num_bins, min_bins, cost_exponent, middle))


@torch.library.custom_op(
    "atfr::cut",
    mutates_args=(),
    schema="(Tensor z, Tensor width, Tensor? frames, Tensor? times, int num_bins, int min_bins, float cost_exponent, bool middle) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _cut(z, width, frames, times, num_bins, min_bins, cost_exponent, middle):
    clips, steps, dim = z.shape
    results = _empty(z, width, frames, times, num_bins, min_bins, cost_exponent, middle)
    block = max(16, triton.next_power_of_2(steps))
    cuts = torch.empty(clips, num_bins, steps, dtype=torch.int32, device=z.device)
    sizes = {"BLOCK_T": block, "BLOCK_D": min(max(16, triton.next_power_of_2(dim)), 32)}
    with torch.cuda.device_of(z):  # Triton launches on the current device
        _cut_kernel[(clips,)](
            z, width, frames, times, *results, cuts, steps, dim, num_bins, min_bins, EXPONENT=cost_exponent, MIDDLE=middle, **sizes, num_warps=8 if block == 128 else 4
        )
    return results


@_cut.register_fake
def _empty(z, width, frames, times, num_bins, min_bins, cost_exponent, middle):
    clips, steps, _ = z.shape
    whole = {"dtype": torch.int64}
    return (
        z.new_empty(clips, num_bins, steps),
        z.new_empty(clips, **whole),
        z.new_empty(clips, **whole),
        z.new_empty(clips, num_bins),
        z.new_empty(clips, steps, **whole),
        z.new_empty(clips, num_bins),
    )


@triton.jit
def _cut_kernel(
    z, width, frames, times,
    weights, lengths, report, mean_times, bins, least, cuts,
    steps, dim, num_bins, min_bins,
    EXPONENT: tl.constexpr, MIDDLE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    clip = tl.program_id(0).to(tl.int64)
    time = tl.arange(0, BLOCK_T)
    count = steps
    if frames is not None:
        count = tl.load(frames + clip).to(tl.int32)
    last = count - 1
    exists = time < count
    width = tl.load(width).to(tl.float32)

    # The variance within frames r+1..t is S_t - S_r - |P_t - P_r|^2 / (t - r), with the sums P of z and S of |z|^2 up to a frame.
    products = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)  # P_r . P_t
    squares = tl.zeros([BLOCK_T], tl.float32)  # |z_t|^2
    uncentred = tl.zeros([BLOCK_T], tl.float32)
    unsound = tl.zeros([BLOCK_T], tl.int32)
    for start in range(0, dim, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = exists[:, None] & (column < dim)[None, :]
        block = tl.load(z + clip * steps * dim + time[:, None] * dim + column[None, :], mask=inside, other=0.0)
        finite = tl.abs(block) < float("inf")
        unsound += tl.sum((~finite).to(tl.int32), axis=1)
        block = tl.where(finite, block, 0.0)
        uncentred += tl.sum(block * block, axis=1)
        block = tl.where(exists[:, None], block - (tl.sum(block, axis=0) / count)[None, :], 0.0)
        squares += tl.sum(block * block, axis=1)
        sums = tl.cumsum(block, axis=0)
        products += tl.dot(sums, tl.trans(sums), input_precision="ieee")
    sound = tl.sum(unsound) == 0
    rounding = 1e-6 * tl.sum(uncentred) / dim
    total = tl.cumsum(squares, axis=0)
    before, until = time[:, None], time[None, :]
    norm = tl.sum(tl.where(before == until, products, 0.0), axis=0)  # |P_t|^2
    apart = norm[None, :] + norm[:, None] - 2 * products
    costs = (total[None, :] - total[:, None] - apart / tl.maximum(until - before, 1)) / dim - rounding
    costs = tl.where(sound, tl.maximum(costs, 0.0), 0.0)
    costs = tl.where(before < until, costs, float("inf"))  # of one bin from the frame after `before` to `until`
    row = (total - norm / (time + 1)) / dim - rounding
    row = tl.where(sound, tl.maximum(row, 0.0), 0.0)  # E_k of the frames up to each one, at first k = 1

    whole = tl.sum(tl.where(time == last, row, 0.0))
    price = width * width
    if EXPONENT == 1.0:
        price *= whole
    elif EXPONENT == 0.5:
        price *= tl.sqrt(whole)
    elif EXPONENT != 0.0:
        price *= tl.exp(EXPONENT * tl.log(whole))
    kept = tl.minimum(tl.zeros([], tl.int32) + min_bins, count)
    lowest = tl.where(kept == 1, whole + price, float("inf"))
    kept_time = time < steps
    tl.store(least + clip * num_bins, whole)
    tl.store(cuts + clip * num_bins * steps + time, tl.zeros([BLOCK_T], tl.int32), mask=kept_time)
    for k in range(1, num_bins):  # k + 1 bins: the last one begins after the frame with the least sum
        row, parted = tl.min(row[:, None] + costs, axis=0, return_indices=True)
        here = tl.sum(tl.where(time == last, row, 0.0))
        tl.store(least + clip * num_bins + k, here)
        tl.store(cuts + (clip * num_bins + k) * steps + time, parted + 1, mask=kept_time)
        value = here + price * (k + 1)
        better = (value < lowest) & (k + 1 >= min_bins)
        lowest = tl.where(better, value, lowest)
        kept = tl.where(better, k + 1, kept)
    tl.debug_barrier()  # `cuts` is read by other threads than wrote it

    set_width = width == width
    cuttable = sound & set_width
    nothing = tl.where(cuttable, tl.zeros([BLOCK_T], tl.float32), float("nan"))
    bin_of = tl.zeros([BLOCK_T], tl.int32)
    stop = last
    for i in range(0, kept):
        k = kept - 1 - i
        begin = tl.load(cuts + (clip * num_bins + k) * steps + stop)
        if MIDDLE:
            first, end = (begin + stop) // 2, (begin + stop) // 2
        else:
            first, end = begin, stop
        size = end - first + 1
        member = (time >= first) & (time <= end)
        weight = tl.where(cuttable, tl.where(member, 1.0 / size, 0.0), float("nan"))
        tl.store(weights + (clip * num_bins + k) * steps + time, weight, mask=kept_time)
        mean_time = (first + end) * 0.5
        if times is not None:
            mean_time = tl.sum(tl.load(times + clip * steps + time, mask=member, other=0.0)) / size
        tl.store(mean_times + clip * num_bins + k, mean_time)
        bin_of = tl.where(time >= begin, tl.maximum(bin_of, k), bin_of)
        stop = begin - 1
    for k in range(kept, num_bins):
        tl.store(weights + (clip * num_bins + k) * steps + time, nothing, mask=kept_time)
        tl.store(mean_times + clip * num_bins + k, 0.0)
    tl.store(bins + clip * steps + time, bin_of, mask=kept_time)
    tl.store(lengths + clip, kept)
    tl.store(report + clip, tl.where(set_width, tl.where(sound, kept, 0), -1))
