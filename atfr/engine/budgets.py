"""From a budget in GFLOPs to the keep ratio that meets it."""

from __future__ import annotations

from typing import Callable

from atfr.models.flops import GflopsTable


def keep_ratio_for(table: GflopsTable, budget: float, *, whole: bool = False) -> float:
    """Return the keep ratio at which a clip costs `budget` x dense; a layer behind others keeps it of what they kept.

    Between two numbers of features the cost is taken to be linear, as it is for clips of which some keep one number and
    some the other. With `whole` every clip keeps equally many: the most that the budget allows.

    Raises:
        ValueError: not even the fewest features are that cheap.
    """
    steps = max(table.frames)

    def cost(step: float) -> float:
        return table.at(bins_at(table, step / steps)) / table.dense

    low, high = 1, steps  # cost(low) <= budget
    if cost(low) > budget and steps == 1:
        raise ValueError(f"a budget of {budget:g} x dense cannot be met: SGS gets one feature a clip, which leaves nothing to sample; set dataset.clip.frames higher, or leave SGS out with model/sgs=off")
    if cost(low) > budget:
        fewest = bins_at(table, low / steps)
        what = "one feature a clip costs" if set(fewest) == {1} else f"the fewest features that the network runs on, {'/'.join(map(str, fewest))} of {'/'.join(map(str, table.frames))}, cost"
        raise ValueError(f"a budget of {budget:g} x dense cannot be met: {what} {cost(low):.3f} x dense; sample at an earlier stage (sgs.after), or set a higher sgs.gflops")
    if cost(high) <= budget:
        return 1.0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    if whole:
        return low / steps
    return (low + (budget - cost(low)) / (cost(high) - cost(low))) / steps


def bins_at(table: GflopsTable, keep_ratio: float) -> tuple[int, ...]:
    """Return the B' of each layer for a clip that keeps this share of its features at each."""
    return tuple(
        max(least, min(most, round(keep_ratio ** (depth + 1) * frames)))
        for least, most, frames, depth in zip(table.least, table.most, table.frames, table.depths)
    )


def refined(keep_ratio: float, budget: float, cost: Callable[[float], float], *, steps: int = 8) -> float:
    """Return a keep ratio near `keep_ratio` at which `cost` (a share of dense, rising) comes closest to `budget`."""
    low, high = keep_ratio / 2, min(1.0, keep_ratio * 1.5)
    if cost(high) <= budget:
        return high
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return low
