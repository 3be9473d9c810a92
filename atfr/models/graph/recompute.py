"""Splits a program into pieces, and recomputes the activations of pieces in the backward pass.

Most memory of training is activations that the forward pass saves for the backward pass. A piece saves its inputs alone,
and runs again in the backward pass (Chen et al., "Training deep nets with sublinear memory cost", 2016). The result must be
that of running it once: dropout draws the same numbers, running statistics are updated once, and no piece samples.
"""

from __future__ import annotations

import operator
from contextlib import ExitStack, contextmanager
from typing import Any, Callable, Iterator, Sequence

from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from atfr.models.graph.packed_program import holds_no_tensor, is_sampling
from atfr.models.packed import ops

MAX_OPERATIONS = 12  # in a piece of a network without blocks
IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


def recomputing(program: fx.GraphModule, *, ends: bool) -> fx.GraphModule:
    """Return the same program with blocks whose activations are recomputed.

    Args:
        ends: the loss follows. The last block then saves its activations, which are needed first.
    """
    groups = blocks(program)
    return in_pieces(program, groups[:-1] if ends else groups, Recomputed)


class Recomputed(nn.Module):
    """Runs a piece without saving its activations, and again in the backward pass."""

    def __init__(self, piece: fx.GraphModule) -> None:
        super().__init__()
        self.piece = piece

    def forward(self, *inputs: Any) -> Any:
        return checkpoint(self.piece, *inputs, use_reentrant=False, context_fn=lambda: (ops.no_recomputation(), self._in_backward()))

    @contextmanager
    def _in_backward(self) -> Iterator[None]:
        """Let batch norms update copies of their running statistics, which the forward pass has updated."""
        norms = [m for m in self.piece.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training and m.track_running_stats]
        with ops.no_recomputation(), ExitStack() as stack:
            for norm in norms:
                own = dict(norm._buffers)
                stack.callback(norm._buffers.update, own)
                norm._buffers.update({name: buffer.clone() for name, buffer in own.items()})
            yield


def in_pieces(program: fx.GraphModule, groups: Sequence[Sequence[fx.Node]], wrap: Callable[[fx.GraphModule], nn.Module]) -> fx.GraphModule:
    """Return the program with each group of consecutive operations as one module, `wrap(program of the group)`."""
    last = {group[-1]: group for group in groups}
    grouped = {node for group in groups for node in group}
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    modules: dict[str, nn.Module] = {}
    for node in program.graph.nodes:
        if node in last:
            inputs, outputs, piece = _own_program(program, last[node])
            name = f"piece_{len(modules)}"
            modules[name] = wrap(piece)
            results = graph.call_module(name, tuple(copies[i] for i in inputs))
            copies.update({output: graph.call_function(operator.getitem, (results, i)) for i, output in enumerate(outputs)})
        elif node not in grouped:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    for node in [n for n in graph.nodes if n.op == "get_attr" and not n.users]:
        graph.erase_node(node)
    own = {n.target: fetched(program, n.target) for n in graph.nodes if n.op in ("call_module", "get_attr") and n.target not in modules}
    return fx.GraphModule({**own, **modules}, graph, type(program).__name__)


def _own_program(program: fx.GraphModule, group: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node], fx.GraphModule]:
    """Return a group's inputs, its outputs that other operations read, and the program from inputs to the tuple of outputs."""
    members = set(group)
    read = list(dict.fromkeys(i for node in group for i in node.all_input_nodes if i not in members))
    inputs = [i for i in read if i.op != "get_attr"]
    outputs = [node for node in group if any(user not in members for user in node.users)]
    graph = fx.Graph()
    copies = {i: graph.placeholder(i.name) for i in inputs}
    for node in [*(i for i in read if i.op == "get_attr"), *group]:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    return inputs, outputs, fx.GraphModule(program, graph, "Piece")


def fetched(root: nn.Module, path: str) -> Any:
    """Return the module, parameter or buffer with this name."""
    return operator.attrgetter(path)(root)


def blocks(program: fx.GraphModule) -> list[list[fx.Node]]:
    """Group operations between points where few values are alive: the blocks of residual networks.

    No group samples, or changes in place a value from outside: it could not run twice.
    """
    nodes = [node for node in program.graph.nodes if node.op not in ("get_attr", "output")]
    index = {node: i for i, node in enumerate(nodes)}
    last_use = [max((index.get(user, len(nodes)) for user in node.users), default=i) for i, node in enumerate(nodes)]
    values = [i for i, node in enumerate(nodes) if not holds_no_tensor(node)]
    alive = [sum(v <= i < last_use[v] for v in values) for i in range(len(nodes))] + [0]
    changed = [changed_in_place(node, program) for node in nodes]
    groups: list[list[fx.Node]] = [[]]
    for i, node in enumerate(nodes):
        group = groups[-1]
        if node.op == "placeholder" or is_sampling(node) or changed[i] not in (None, *group):
            groups.append([])
            continue
        group.append(node)
        at_an_end = alive[i] < alive[i + 1] or (alive[i] == 1 and len(group) >= MAX_OPERATIONS)
        if at_an_end and not any(other in group for other in changed[i + 1 :]):
            groups.append([])
    return [group for group in groups if group]


def changed_in_place(node: fx.Node, program: fx.GraphModule) -> fx.Node | None:
    """Return the value that an operation changes in place, if any."""
    if node.op == "call_module":
        changes = getattr(fetched(program, node.target), "inplace", False)
    elif node.op == "call_method":
        changes = node.target.endswith("_") and not node.target.endswith("__")
    else:
        name = getattr(node.target, "__name__", "")
        flag = node.args[1] if node.target is nn.functional.relu and len(node.args) > 1 else node.kwargs.get("inplace", False)
        changes = node.target in IN_PLACE or (name.endswith("_") and not name.endswith("__")) or flag is True
    return node.all_input_nodes[0] if changes and node.all_input_nodes else None
