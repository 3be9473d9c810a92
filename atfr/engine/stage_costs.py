"""Output shape, parameters and GFLOPs of each stage of a network, dense and with SGS."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from atfr.engine.budgets import bins_at, keep_ratio_for
from atfr.models.flops import GflopsTable
from atfr.models.graph.probing import evaluating
from atfr.models.packed import ops
from atfr.models.video_net import VideoNet

HEAD = "(head)"  # not the name of a module; the convolutions and linear layers behind the last stage
OTHER = "(other)"  # everything that is no convolution or linear layer: pools, squeeze-excitation, sampling


@dataclass(frozen=True)
class StageCost:
    """One row of the table; GFLOPs of one clip in fvcore's convention."""

    name: str
    output: tuple[int, ...]  # shape for one clip, of the dense network; () where it has none
    params: int
    dense_gflops: float
    sampled_gflops: float | None  # None for a dense network


def expected_bins(model: VideoNet, table: GflopsTable) -> tuple[int, ...]:
    """Return the B' of a clip at the budget of the SGS layers; T / 2 where B' follows no budget."""
    if not model.sgs:
        return ()
    options = next(iter(model.sgs.values())).options  # the same for all layers
    ratio = options.keep_ratio or 0.5
    if options.gflops is not None:
        ratio = keep_ratio_for(table, options.gflops, whole=options.has_fixed_cost)
    if options.has_fixed_cost and not options.follows_budget:
        return table.most
    return bins_at(table, ratio)


def stage_costs(model: VideoNet, table: GflopsTable, clip_shape: tuple[int, int, int, int], bins: tuple[int, ...]) -> list[StageCost]:
    """Split a clip's GFLOPs among the stages of a network.

    Args:
        table: of this model and this clip.
        clip_shape: (3, T, H, W).
        bins: B' of the clip at each SGS layer; () for a dense network.

    Returns:
        A row a stage in the order in which they end, then `HEAD` and `OTHER`. The columns add up to the
        network's parameters, `table.dense` and `table.at(bins)`.
    """
    model = copy.deepcopy(model).cpu()
    stages = model.stage_paths or {name: name for name, _ in model.dense_network.named_children()}
    clip = torch.zeros(1, *clip_shape)
    with evaluating(model):
        ended, shapes, dense = _run_dense(model.dense_network, clip)
        sampled = _run_sampled(model, clip, bins) if model.sgs else None
    order = sorted((path for path in stages.values() if path in ended), key=ended.__getitem__)
    names = {path: name for name, path in stages.items()}

    def stage_of(path: str) -> str:
        return next((names[stage] for stage in order if ended.get(path, 0) <= ended[stage]), HEAD)

    params = {path: sum(p.numel() for p in module.parameters(recurse=False)) for path, module in model.dense_network.named_modules()}
    rows = []
    for name, path in [*((names[path], path) for path in order), (HEAD, "")]:
        own = [member for member in params if stage_of(member) == name]
        costs = [sum(costs.get(member, 0.0) for member in own) for costs in (dense, sampled or {})]
        rows.append(StageCost(name, shapes[path], sum(params[member] for member in own), costs[0], costs[1] if sampled is not None else None))
    rest = max(0.0, table.dense - sum(row.dense_gflops for row in rows))  # not a rounding error below 0
    sampled_rest = None if sampled is None else max(0.0, table.at(bins) - sum(row.sampled_gflops or 0.0 for row in rows))
    layers = sum(p.numel() for p in model.sgs.parameters())
    return [*rows, StageCost(OTHER, (), layers, rest, sampled_rest)]


def _run_dense(network: nn.Module, clip: Tensor) -> tuple[dict[str, int], dict[str, tuple[int, ...]], dict[str, float]]:
    """When each module ended, the shape of its output, and the GFLOPs of each convolution and linear layer."""
    ended: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    costs: dict[str, float] = {}

    def note(path: str, module: nn.Module, output: Any) -> None:
        ended[path] = len(ended)
        shapes[path] = tuple(output.shape) if isinstance(output, Tensor) else ()
        _count(costs, path, module, output)

    with _noting(network, note):
        network(clip)
    return ended, shapes, costs


@contextmanager
def _noting(network: nn.Module, note: Any) -> Iterator[None]:
    hooks = [module.register_forward_hook(lambda m, _, output, path=path: note(path, m, output)) for path, module in network.named_modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _run_sampled(model: VideoNet, clip: Tensor, bins: tuple[int, ...]) -> dict[str, float]:
    """The GFLOPs of each convolution and linear layer for a clip that keeps `bins` features."""
    costs: dict[str, float] = {}
    with _noting(model.dense_network, partial(_count, costs)):
        features = model.run_stem(clip)
        forced = [(b,) for b in bins]
        if model.execution == "packed":
            _PackedCosts(model.packed_trunk, costs).run(*features, forced)
        else:
            model.run_trunk(*features, forced=forced)
    return costs


class _PackedCosts(fx.Interpreter):
    """Adds the convolutions that a packed trunk does not run as modules."""

    def __init__(self, trunk: nn.Module, costs: dict[str, float]) -> None:
        super().__init__(trunk)
        self.costs = costs

    def run_node(self, node: fx.Node) -> Any:
        if node.target is not ops.conv3d:
            return super().run_node(node)
        path = node.args[0].target
        before = self.costs.get(path, 0.0)
        result = super().run_node(node)
        # Not what a hook counted: with the frames that pad the clip.
        self.costs[path] = before + _gflops(self.fetch_attr(node.args[0].target), result)
        return result


def _count(costs: dict[str, float], path: str, module: nn.Module, output: Any) -> None:
    costs[path] = costs.get(path, 0.0) + _gflops(module, output)


def _gflops(module: nn.Module, output: Any) -> float:
    """GFLOPs of a convolution or a linear layer from the size of its output; 0 for any other module."""
    if not isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
        return 0.0
    return module.weight.numel() * output.numel() / module.weight.shape[0] / 1e9


def as_table(rows: Sequence[StageCost]) -> str:
    """Format the rows, with a last one of sums."""
    sampled = rows[0].sampled_gflops is not None
    total = StageCost("total", (), *(sum(getattr(row, name) or 0 for row in rows) for name in ("params", "dense_gflops", "sampled_gflops")))
    lines = [f"{'stage':<12} {'output [C, T, H, W]':<22} {'parameters':>12} {'GFLOPs':>10}" + (f" {'with SGS':>10}" if sampled else "")]
    for row in [*rows, total]:
        shape = str(list(row.output[1:])) if row.output else ""
        after = f" {row.sampled_gflops:>10.4f}" if sampled and row.sampled_gflops is not None else ""
        lines.append(f"{row.name:<12} {shape:<22} {row.params:>12,} {row.dense_gflops:>10.4f}{after}")
    return "\n".join(lines)
