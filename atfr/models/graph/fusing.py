"""Joins operations of a packed program into ones that a single kernel computes, for GPUs.

A convolution over time moves its features into rows and back. A ReLU in front of it is computed on the way in; batch norm
in evaluation, a residual sum and a ReLU behind it on the way out. Packed execution has no more launches than dense then.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from atfr.models.graph.recompute import changed_in_place, fetched
from atfr.models.packed import cpu, ops
from atfr.models.packed.segments import Segments, Selection, layout, window_of

ADDS = (operator.add, operator.iadd, torch.add)


@dataclass
class Chain:
    """[ReLU, convolution over time,] batch norm [, residual sum] [, ReLU]: each is read by the next alone."""

    norm: fx.Node
    nodes: list[fx.Node]  # in the order of the graph
    x: fx.Node
    segments: fx.Node | None = None
    residual: fx.Node | None = None
    before: fx.Node | None = None
    conv: fx.Node | None = None
    after: fx.Node | None = None


def fusing(program: fx.GraphModule) -> fx.GraphModule:
    """Return the same program, in which `run` computes each chain."""
    chains: dict[fx.Node, Chain] = {}  # by the last node
    members: set[fx.Node] = set()
    for node in program.graph.nodes:
        chain = _chain(node, program)
        if chain is not None and len(chain.nodes) > 1 and not members.intersection(chain.nodes):
            chains[chain.nodes[-1]] = chain
            members.update(chain.nodes)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}

    def module(node: fx.Node | None) -> fx.Node | None:
        return None if node is None else graph.get_attr(node.target)

    for node in program.graph.nodes:
        if node in chains:
            chain = chains[node]
            x, segments, residual = (None if value is None else copies[value] for value in (chain.x, chain.segments, chain.residual))
            modules = {"after": module(chain.after), "conv": module(chain.conv), "before": module(chain.before)}
            copies[node] = graph.call_function(run, (module(chain.norm), x), {"segments": segments, "residual": residual, **modules})
        elif node not in members:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    for node in [n for n in graph.nodes if n.op == "get_attr" and not n.users]:
        graph.erase_node(node)
    own = {n.target: fetched(program, n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")}
    return fx.GraphModule(own, graph, type(program).__name__)


def _chain(node: fx.Node, program: fx.GraphModule) -> Chain | None:
    """Return the chain round this batch norm; None for another node, or where it would read what was changed in place since."""
    norm = _module(node, program)
    if not isinstance(norm, nn.BatchNorm3d) or type(norm).forward is not nn.BatchNorm3d.forward:
        return None
    x = node.args[0]
    chain = Chain(node, [node], x)
    if x.target is ops.conv3d and len(x.users) == 1:
        chain.nodes.insert(0, x)
        chain.conv, chain.x, chain.segments = x.args
        x = chain.x
        in_place = changed_in_place(x, program)  # by the ReLU: others that read this expect what it wrote
        if type(_module(x, program)) is nn.ReLU and _goes_in(x, program) and (in_place is None or len(in_place.users) == 1):
            chain.nodes.insert(0, x)
            chain.before, chain.x = x, x.args[0]
    following = _only_user(chain.nodes[-1])
    if following is not None and following.target in ADDS and len(following.args) == 2 and not following.kwargs:
        one, other = following.args
        residual = other if one is chain.nodes[-1] else one
        if isinstance(residual, fx.Node) and residual is not chain.nodes[-1] and changed_in_place(following, program) in (None, chain.nodes[-1]):
            chain.residual = residual
            chain.nodes.append(following)
            following = _only_user(following)
    if following is not None and type(_module(following, program)) is nn.ReLU and not _goes_in(following, program):
        chain.after = following
        chain.nodes.append(following)
    return None if _changed_within(chain, program) else chain


def _goes_in(relu: fx.Node, program: fx.GraphModule) -> bool:
    """Return whether the next operation is an ungrouped convolution over time, which computes the ReLU on the way in."""
    user = _only_user(relu)
    return user is not None and user.target is ops.conv3d and fetched(program, user.args[0].target).groups == 1


def _changed_within(chain: Chain, program: fx.GraphModule) -> bool:
    """Return whether another operation changes what the chain reads between its first and its last node."""
    nodes, read = list(program.graph.nodes), [value for value in (chain.x, chain.residual) if value is not None]
    within = nodes[nodes.index(chain.nodes[0]) : nodes.index(chain.nodes[-1])]
    return any(changed_in_place(node, program) in read for node in within if node not in chain.nodes)


def _module(node: fx.Node, program: fx.GraphModule) -> nn.Module | None:
    return fetched(program, node.target) if node.op == "call_module" else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def run(
    norm: nn.BatchNorm3d,
    x: Tensor,
    *,
    segments: Segments | None = None,
    residual: Tensor | None = None,
    before: nn.Module | None = None,
    conv: nn.Conv3d | None = None,
    after: nn.Module | None = None,
) -> Tensor:
    """Compute after(norm(conv(before(x))) + residual) of packed features [1, C, M, H, W], with what is None left out.

    Modules with hooks are called one by one, and all of them where no kernel runs.
    """
    selection = None
    if conv is not None and segments is not None:
        x, selection = _convolved(conv, x, segments, before, select=not _ready(norm))
    hooked = after is not None and cpu.has_hooks(after)
    frames = x.shape[2] if selection is None else len(selection.slots)
    joined = not hooked and ops.kernels_take(x) and (residual is None or (residual.dtype == x.dtype and residual.shape == (*x.shape[:2], frames, *x.shape[3:])))
    if joined and _ready(norm):
        from atfr.models.packed.kernels.rows import normalise_frames

        slots = None if selection is None else selection.slots
        return normalise_frames(x, slots, norm.running_mean, norm.running_var, norm.weight, norm.bias, residual, norm.eps, after is not None)
    x = norm(x if selection is None else ops.selected(x, selection))
    if joined and after is not None and residual is not None and residual.dtype == x.dtype:
        from atfr.models.packed.kernels.rows import add_relu

        return add_relu(x, residual)
    x = x if residual is None else x + residual
    return x if after is None else after(x)


def _convolved(conv: nn.Conv3d, x: Tensor, segments: Segments, before: nn.Module | None, *, select: bool) -> tuple[Tensor, Selection | None]:
    """Compute conv(before(x)); without `select` there may be outputs that belong to no clip, and a selection of the others."""
    if not (ops.kernels_take(x) and ops.needs_rows(conv, x, segments)):
        return ops.conv3d(conv, x if before is None else before(x), segments), None
    relu = before is not None and not cpu.has_hooks(before)
    x = x if before is None or relu else before(x)
    out = ops.conv_in_rows(conv, x, segments, relu=relu, select=select)
    return out, None if select else layout(segments.lengths, window_of(conv), x.device).out


def _ready(norm: nn.BatchNorm3d) -> bool:
    """Return whether `normalise_frames` computes this norm: in evaluation, without gradients."""
    if torch.is_grad_enabled() or norm.training or norm.running_mean is None or norm.running_var is None or cpu.has_hooks(norm):
        return False
    return (norm.weight is None) == (norm.bias is None)
