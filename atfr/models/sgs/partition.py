"""The optimal cut of a clip into contiguous bins: `similarity=partition` of SGS, as pure functions.

The cost of a cut is the variance within its bins: the sum over frames of the squared distance to the bin's mean. E_k is the
least cost of k contiguous bins, found exactly by dynamic programming (Fisher, "On grouping for maximum homogeneity", 1958).
Every bin has a price, and a clip keeps the k that minimises E_k + price x k. A greedy scan opens a bin at the first frame
that differs enough; this compares all cuts, so that a gradual change takes few bins and a short event keeps its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST_FRAMES = 128  # T that `partition_kernel` can take: the costs of all bins of a clip stay in registers


def partition_bins(
    z: Tensor, frames: Tensor, *, width: float | Tensor, num_bins: int, min_bins: int = 1, cost_exponent: float = 0.0
) -> Tensor:
    """Return the bin of each frame, [N, T] int64; padding beyond a clip's `frames` [N] is in its last bin.

    Args:
        z: [N, T, D] float32 or float64, 0 in padding.
        width, cost_exponent: the price of a bin is width^2 x (E_1)^cost_exponent, with distances as root mean squares
            over D. At 0 all clips have the same price, and B' depends on the amount of change; at 1 B' depends on how the
            change is distributed over time, not on its amount.
        num_bins, min_bins: bounds of B'; a clip never has more bins than frames, though these be fewer than `min_bins`.
    """
    least, cuts = best_cuts(z.detach(), frames, num_bins=num_bins)
    return bins_of_cuts(cuts, bin_counts(least, width=width, min_bins=min_bins, cost_exponent=cost_exponent), frames)


def best_cuts(z: Tensor, frames: Tensor, *, num_bins: int) -> tuple[Tensor, Tensor]:
    """Return E_k of each clip, [N, B] (infinite for more bins than frames), and the cuts with these costs.

    cuts[n, t, k] is the first frame of the last bin in the best cut of the first t frames of clip n into k bins.
    """
    costs, steps = within_costs(z, frames), z.shape[1]
    least = z.new_full((len(z), steps + 1, num_bins + 1), torch.inf)
    least[:, 0, 0] = 0
    cuts = torch.zeros(least.shape, dtype=torch.int64, device=z.device)
    for t in range(1, steps + 1):  # the first t frames: their last bin begins at any s before t
        values, begins = (least[:, :t, :-1] + costs[:, :t, t, None]).min(dim=1)  # [N, B]
        least[:, t, 1:], cuts[:, t, 1:] = values, begins
    ends = frames[:, None, None].expand(-1, 1, num_bins + 1)
    return least.gather(1, ends)[:, 0, 1:], cuts


def within_costs(z: Tensor, frames: Tensor) -> Tensor:
    """Return [N, T + 1, T + 1]: at s < t the variance within one bin of frames s..t-1; else infinite.

    It is the mean square over D, summed over the frames: sum |z|^2 - |sum z|^2 / count, from block sums of the Gram matrix.
    """
    n, steps, dim = z.shape
    rounding = 1e-6 * z.square().sum(dim=(1, 2)) / dim  # differences below it are rounding errors of equal frames
    z = z - z.sum(dim=1, keepdim=True) / frames[:, None, None]
    gram = z @ z.transpose(1, 2) / dim
    squares, blocks = z.new_zeros(n, steps + 1), z.new_zeros(n, steps + 1, steps + 1)
    squares[:, 1:] = gram.diagonal(dim1=1, dim2=2).cumsum(dim=1)
    blocks[:, 1:, 1:] = gram.cumsum(dim=1).cumsum(dim=2)  # of the products of the first i and j frames
    corner = blocks.diagonal(dim1=1, dim2=2)  # [N, T + 1]
    inside = corner[:, None] + corner[:, :, None] - 2 * blocks  # of frames s..t-1 with each other
    time = torch.arange(steps + 1, device=z.device)
    count = time - time[:, None]  # t - s
    costs = squares[:, None] - squares[:, :, None] - inside / count.clamp(min=1)
    return (costs - rounding[:, None, None]).clamp(min=0).masked_fill(count < 1, torch.inf)


def bin_counts(least: Tensor, *, width: float | Tensor, min_bins: int = 1, cost_exponent: float = 0.0) -> Tensor:
    """Return the number of bins, at least `min_bins`, with the least E_k + price x k: E_k [N, B] -> [N] int64."""
    price = width**2 * (least[:, :1] if cost_exponent == 1 else least[:, :1] ** cost_exponent if cost_exponent else 1.0)
    number = torch.arange(1, least.shape[1] + 1, device=least.device, dtype=least.dtype)
    best = (least + price * number)[:, min_bins - 1 :].argmin(dim=1) + min_bins
    return best.minimum(least.isfinite().sum(dim=1))  # the frames of a clip that has fewer than `min_bins`


def width_keeping(z: Tensor, frames: Tensor, *, num_bins: int, mean_bins: float, cost_exponent: float = 0.0) -> Tensor:
    """Return the least width, to 1e-4, at which these clips keep at most `mean_bins` bins on average: a scalar, without a wait for the device.

    A clip keeps more than k bins at any price below max over j > k of min over i <= k of (E_i - E_j) / (j - i). The sorted
    thresholds of all clips give the number of bins at each price. For z and frames see `partition_bins`.
    """
    least, _ = best_cuts(z, frames, num_bins=num_bins)
    number = torch.arange(least.shape[1], device=z.device)
    before = number[:, None] < number  # [B, B]: i < j
    slopes = (least[:, :, None] - least[:, None]) / (number - number[:, None]).clamp(min=1)  # [N, i, j]
    saved = slopes.masked_fill(~before, torch.inf).cummin(dim=1).values.masked_fill(~before, -torch.inf)  # [N, k, j]
    prices = saved.amax(dim=2)[:, :-1] / least[:, :1] ** cost_exponent  # [N, B - 1] in units of width^2
    prices = prices.nan_to_num(0, posinf=0, neginf=0).clamp(min=0).flatten().sort(descending=True).values
    further = max(int(len(least) * (mean_bins - 1) + 1e-6), 0)  # bins beyond one a clip
    at = prices[further] if further < len(prices) else prices.new_zeros(())
    return at.sqrt() * (1 + 1e-4)


def bins_of_cuts(cuts: Tensor, counts: Tensor, frames: Tensor) -> Tensor:
    """Return the bins, [N, T], of the best cut of each clip into counts[n] bins, traced back from its last bin."""
    steps, most = cuts.shape[1] - 1, min(cuts.shape[1], cuts.shape[2]) - 1
    clip, time = torch.arange(len(cuts), device=cuts.device), torch.arange(steps, device=cuts.device)
    left = (counts[:, None] - torch.arange(most, device=cuts.device)).clamp(min=0)  # [N, most] bins not yet read
    begins = [frames]
    for k in range(most):
        begins.append(cuts[clip, begins[-1], left[:, k]])
    begun = torch.stack(begins[1:], dim=1).masked_fill(left == 0, steps)  # [N, most]
    return (time >= begun[:, :, None]).sum(dim=1) - 1
