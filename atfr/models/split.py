"""Cut a network in two at a named place, its second half rewritten for packed execution.

`torch.fx` traces the network into a graph of its leaf modules. The graph is cut behind the chosen
module; the first half runs on a batch of clips as always, and in the second half every operation
that looks along time is replaced by its packed form. Both halves call the network's own modules,
so its parameters, their names and its checkpoints stay as they are.
"""

from __future__ import annotations

import operator
from typing import Callable

import torch
from fvcore.nn.squeeze_excitation import SqueezeExcitation
from torch import fx, nn

from atfr.models import packed

FRAMEWISE_MODULES = (nn.BatchNorm3d, nn.ReLU, nn.SiLU, nn.Sigmoid, nn.Dropout, nn.Identity)
FRAMEWISE_FUNCTIONS = (operator.add, operator.iadd, torch.add, torch.relu, nn.functional.relu)


def split_network(
    network: nn.Module, *, after: str, before_activation: bool
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """(stem, trunk) of `network`, cut behind the module at path `after`.

    stem: [N, 3, T, H, W] -> features [N, C, T', H', W']. trunk: (packed features
    [1, C, M, H', W'], Segments) -> what the network returns, one row a clip. With
    `before_activation`, a final ReLU of the module belongs to the trunk.

    Raises:
        ValueError: no module of that name; a module or function in the trunk that is not known to
            be framewise and has no packed form; a value that by-passes the cut.
    """
    tracer = _LeafTracer()
    graph = tracer.trace(network)
    if after not in tracer.outputs:
        raise ValueError(f"there is no module {after!r} to put SGS behind; there are {', '.join(tracer.outputs)}")
    cut = tracer.outputs[after]
    if before_activation and cut.op == "call_module" and isinstance(network.get_submodule(cut.target), nn.ReLU):
        cut = cut.args[0]
    return _stem(network, graph, cut), _trunk(network, graph, cut)


class _LeafTracer(fx.Tracer):
    """Stops at torch's own modules and at those with a packed form; remembers each module's output."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[str, fx.Node] = {}

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, SqueezeExcitation) or super().is_leaf_module(module, name)

    def call_module(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> object:
        output = super().call_module(module, forward, args, kwargs)
        if isinstance(output, fx.Proxy):
            self.outputs[self.path_of_module(module)] = output.node
        return output


def _stem(network: nn.Module, graph: fx.Graph, cut: fx.Node) -> fx.GraphModule:
    stem, copies = fx.Graph(), {}
    for node in graph.nodes:
        copies[node] = stem.node_copy(node, copies.__getitem__)
        if node is cut:
            break
    stem.output(copies[cut])
    return fx.GraphModule(network, stem, "Stem")


def _trunk(network: nn.Module, graph: fx.Graph, cut: fx.Node) -> fx.GraphModule:
    trunk = fx.Graph()
    copies = {cut: trunk.placeholder("x")}
    segments = trunk.placeholder("segments")
    is_packed = {cut}  # the others are per clip already, behind a global pool
    nodes = list(graph.nodes)
    for node in nodes[nodes.index(cut) + 1 :]:
        for source in node.all_input_nodes:
            if source not in copies:
                raise ValueError(
                    f"SGS cannot be put behind {cut.name!r}: {node.name!r} also needs {source.name!r} from before it, which keeps all frames"
                )
        if not is_packed.intersection(node.all_input_nodes):
            copies[node] = trunk.node_copy(node, copies.__getitem__)
        elif node.op == "call_module":
            run = _packed_form(network.get_submodule(node.target), node.target)
            if run is None:
                copies[node] = trunk.node_copy(node, copies.__getitem__)
            else:
                module = trunk.get_attr(node.target)
                copies[node] = trunk.call_function(run, (module, copies[node.args[0]], segments))
            if run is not packed.global_pool:
                is_packed.add(node)
        elif node.op == "call_function" and node.target in FRAMEWISE_FUNCTIONS:
            copies[node] = trunk.node_copy(node, copies.__getitem__)
            is_packed.add(node)
        else:
            raise ValueError(f"{node.name!r} ({node.target}) behind SGS has no packed form: it may mix the features of different clips")
    return fx.GraphModule(network, trunk, "Trunk")


def _packed_form(module: nn.Module, path: str) -> Callable | None:
    """The function that runs `module` on packed features; None where the module runs as it is."""
    if isinstance(module, FRAMEWISE_MODULES):
        return None
    if isinstance(module, nn.Conv3d):
        reach = module.dilation[0] * (module.kernel_size[0] - 1)
        if module.stride[0] != 1 or 2 * module.padding[0] != reach:
            raise ValueError(f"{path} behind SGS changes the number of features in time ({module}): no packed form yet")
        return packed.conv3d if reach else None
    if isinstance(module, SqueezeExcitation):
        return packed.squeeze_excitation
    if isinstance(module, nn.AdaptiveAvgPool3d) and module.output_size in (1, (1, 1, 1)):
        return packed.global_pool
    raise ValueError(f"{path} behind SGS has no packed form: {type(module).__name__} may mix the features of different clips")
