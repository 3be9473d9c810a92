"""The best cut of a clip into contiguous bins, found by a trial of all cuts."""

from __future__ import annotations

from itertools import combinations

import torch


def left_over(clip: torch.Tensor, bounds: list[int]) -> float:
    """Sum over frames of the mean squared difference to their bin's mean."""
    parts = [clip[s:t] for s, t in zip(bounds, bounds[1:])]
    return sum(float(((frame - sum(part) / len(part)) ** 2).mean()) for part in parts for frame in part)


def all_cuts(clip: torch.Tensor, bins: int) -> list[list[int]]:
    return [[0, *inner, len(clip)] for inner in combinations(range(1, len(clip)), bins - 1)]


def bins_by_trial(clip: torch.Tensor, *, width: float, cost_exponent: float, least: int, most: int) -> list[int]:
    whole = left_over(clip, [0, len(clip)])
    price = width**2 * whole**cost_exponent
    costs = {tuple(cut): left_over(clip, cut) + price * k for k in range(least, min(most, len(clip)) + 1) for cut in all_cuts(clip, k)}
    cut = min(costs, key=costs.get)
    return [sum(t >= begin for begin in cut[1:-1]) for t in range(len(clip))]
