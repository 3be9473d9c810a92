"""A network with SGS made to cost a given share of the dense network, without training."""

from __future__ import annotations

from dataclasses import replace

from atfr.engine.flops import GflopsTable
from atfr.models.video_net import VideoNet


def share_for(table: GflopsTable, budget: float, *, whole: bool) -> float:
    """The share of T to keep at each layer at which a clip costs `budget` x dense.

    Between two numbers of features the cost is taken to be linear, as it is over clips that keep
    one or the other. With `whole` every clip keeps equally many: the most that the budget allows.

    Raises:
        ValueError: not even the fewest features are as cheap as that.
    """
    steps = max(table.frames)
    shares = [i / steps for i in range(1, steps + 1)]
    costs = [table.at(_bins(table, share)) / table.dense for share in shares]
    if budget < costs[0]:
        raise ValueError(f"a budget of {budget:g} x dense cannot be met: one feature a clip costs {costs[0]:.3f} x dense; sample at an earlier stage (model.sgs.after)")
    last = max(i for i, cost in enumerate(costs) if cost <= budget)
    if whole or last == len(shares) - 1:
        return shares[last]
    rise = costs[last + 1] - costs[last]
    return shares[last] + (budget - costs[last]) / rise / steps


def set_share(model: VideoNet, share: float) -> None:
    """Make `share` x T the mean B' that every layer is calibrated to, or the B' of a baseline.

    Raises:
        ValueError: a layer's B' does not follow a target (scale=relative, a fixed width, the baseline
            `none`), or layers follow each other, so that one's share is of what another kept.
    """
    if len(model.levels) > 1:
        raise ValueError("a budget can only be set for SGS layers that do not follow each other: give model.sgs.after one place")
    for layer in model.sgs.values():
        if not (layer.tracks_width or layer.is_baseline) or layer.options.similarity == "none":
            raise ValueError(
                f"SGS after {layer.name!r} has no B' to aim at (similarity={layer.options.similarity}, scale={layer.options.scale}, width={layer.options.width}): scale=absolute with width=null has, and uniform, stride and random"
            )
        layer.options = replace(layer.options, target=share)
        if layer.is_baseline:
            layer.num_bins = None


def _bins(table: GflopsTable, share: float) -> tuple[int, ...]:
    return tuple(max(least, round(share * frames)) for least, frames in zip(table.least, table.frames))
