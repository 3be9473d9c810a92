"""Traces a network into a `torch.fx` graph, and writes programs of parts of it.

The graph consists of the network's leaf modules. Programs call these modules themselves, so that parameters, their
names and checkpoints do not change. Separable and depthwise convolutions and pools are called through
`convolution.conv3d` and `deterministic_pools.pool3d`.

Layers that do not depend on each other (the two pathways of a SlowFast) sample together; a layer behind another one is
a *level* of its own.
"""

from __future__ import annotations

import operator
import traceback
from functools import reduce
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from atfr.models.graph import probing
from atfr.models.packed import convolution, cpu, deterministic_pools, registry
from atfr.models.packed.kernels import depthwise, support

TORCH = str(Path(torch.__file__).parent)
FUNCTIONS = (convolution.conv3d, deterministic_pools.pool3d)  # that take a module and its input
INPUT = "input"  # the location before all modules: the clips themselves are sampled


class Traced:
    """A network's graph, the nodes that are sampled, and each node's level.

    Args:
        locations: {name of a layer: path of the module whose output it samples}.
        before_activation: a ReLU's input is sampled in place of its output.
        embeds_clip: the first layers embed the clip, which bypasses the stem then.

    Raises:
        ValueError: torch.fx cannot trace the network; or a location has no output or is given twice.
    """

    def __init__(
        self, network: nn.Module, locations: Mapping[str, str], *, before_activation: bool = False, embeds_clip: bool = False
    ) -> None:
        self.network, self.embeds_clip = network, embeds_clip
        self.nodes, outputs = _trace(network)
        outputs.setdefault(INPUT, self.nodes[0])
        self.cuts: dict[fx.Node, str] = {}  # node -> name of the layer behind it
        for name, path in locations.items():
            if path not in outputs:
                raise ValueError(f"sgs.after={name!r}: there is no module {path!r} with an output to sample")
            cut = outputs[path]
            if before_activation and cut.op == "call_module" and isinstance(network.get_submodule(cut.target), nn.ReLU):
                cut = cut.args[0]
            if cut in self.cuts:
                raise ValueError(f"sgs.after names the same location twice: {self.cuts[cut]} and {name}")
            self.cuts[cut] = name
        # The nodes that read how many clips there are from the clips' shape, as in `x.view(x.shape[0], -1)`.
        self.batch_sizes = [node for node in self.nodes if read_by_batch_size(node) is self.nodes[0]]
        self.level: dict[fx.Node, int] = {}
        for node in self.nodes:
            self.level[node] = max((self.level[i] + (i in self.cuts) for i in node.all_input_nodes), default=0)
        if self.cuts:
            self._check_joints()

    @property
    def levels(self) -> list[list[fx.Node]]:
        """The sampled nodes, those that sample together in one list."""
        depths = sorted({self.level[cut] for cut in self.cuts})
        return [[cut for cut in self.cuts if self.level[cut] == depth] for depth in depths]

    @property
    def frontier(self) -> list[fx.Node]:
        """The stem's outputs: the features to sample first, then the clip if layers embed it, then tensors that bypass sampling."""
        first = self.levels[0]
        clip = [self.nodes[0]] if self.embeds_clip and self.nodes[0] not in first else []
        later = [n for n in self.nodes if self.level[n] > 0]
        bypassing = {i: None for n in later for i in n.all_input_nodes if self.level[i] == 0 and i.op != "get_attr" and i not in first}
        return first + clip + [node for node in bypassing if node not in clip and node not in self.batch_sizes]

    def _check_joints(self) -> None:
        """Raise ValueError where the network gives more than a tensor, or uses a size of the clips behind SGS, where lengths differ."""
        result = self.nodes[-1].args[0]
        if not isinstance(result, fx.Node):
            kind = next((kind.__name__ for kind in (tuple, list, dict) if isinstance(result, kind)), type(result).__name__)
            raise ValueError(f"SGS needs a network that returns its logits [N, classes] alone, not a {kind}")
        for node in self.frontier:
            if _is_of_sizes(node):
                raise ValueError(f"{node.name!r}, a size that is read before SGS, is used behind it: read it from the tensor that it is used on (the batch size, x.shape[0], may be read from the clips)")

    def stem(self, outputs: Sequence[fx.Node] | None = None) -> fx.GraphModule:
        """Write the program clips [N, 3, T, H, W] -> the frontier, or other outputs, as a tuple."""
        outputs = self.frontier if outputs is None else list(outputs)
        needed = set(outputs)
        for node in reversed(self.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            if node in needed or node.op == "placeholder":
                copies[node] = self.copy(graph, node, copies)
        graph.output(tuple(copies[node] for node in outputs))
        return self.program(graph, "Stem")

    def whole(self) -> fx.GraphModule:
        """Write the program of the network without sampling: clips -> its output."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            copies[node] = self.copy(graph, node, copies)
        return self.program(graph, "Network")

    def plain_trunk(self) -> fx.GraphModule:
        """Write the program the frontier, its features sampled and of one length -> the network's output."""
        graph = fx.Graph()
        copies = {node: graph.placeholder(node.name) for node in self.frontier}
        copies.update({node: graph.call_method("size", (copies[self.frontier[0]], 0)) for node in self.batch_sizes})
        for node in self.nodes:
            if self.level[node] > 0 or node.op == "get_attr":
                copies[node] = self.copy(graph, node, copies)
        return self.program(graph, "PlainTrunk")

    def copy(self, graph: fx.Graph, node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """Copy a node into a program's graph; `copies` are those of its inputs."""
        function = _function_of(self.network.get_submodule(node.target)) if node.op == "call_module" else None
        if function is None or len(node.args) != 1 or node.kwargs:
            return graph.node_copy(node, copies.__getitem__)
        module = graph.get_attr(node.target)
        return graph.create_node("call_function", function, (module, copies[node.args[0]]), name=node.name)

    def program(self, graph: fx.Graph, name: str, layers: Mapping[str, nn.Module] = {}) -> fx.GraphModule:
        """Return a graph as a module that has the network's own modules, parameters and buffers, and `layers` under their paths."""
        paths = {node.target for node in graph.nodes if node.op in ("call_module", "get_attr")}
        return fx.GraphModule({path: layers[path] if path in layers else reduce(getattr, path.split("."), self.network) for path in paths}, graph, name)


def read_again(programs: Iterable[nn.Module], network: nn.Module) -> None:
    """Give programs the tensors of the network that its `forward` reads itself, after `network.to`, which puts others in their place."""
    for program in (piece for whole in programs for piece in whole.modules() if isinstance(piece, fx.GraphModule)):
        for path in (str(node.target) for node in program.graph.nodes if node.op == "get_attr"):
            parent, _, name = path.rpartition(".")
            holder = program.get_submodule(parent)
            for tensors in (holder._buffers, holder._parameters):
                if name in tensors:
                    tensors[name] = getattr(network.get_submodule(parent), name)


def is_shape(node: fx.Node) -> bool:
    """Return whether this reads the shape of a tensor, or its first sizes."""
    if node.target is operator.getitem and isinstance(node.args[1], slice):
        return not node.args[1].start and isinstance(node.args[0], fx.Node) and is_shape(node.args[0])
    return (node.target is getattr and node.args[1] == "shape") or (node.target == "size" and len(node.args) == 1 and not node.kwargs)


def read_by_batch_size(node: fx.Node) -> fx.Node | None:
    """Return the tensor whose first size this reads; None for any other operation."""
    if node.target == "size":
        return node.args[0] if registry.argument(node, 1, "dim", None) == 0 else None
    if node.target is not operator.getitem or node.args[1] != 0 or not isinstance(node.args[0], fx.Node) or not is_shape(node.args[0]):
        return None
    shape = node.args[0]
    while shape.target is operator.getitem:  # a slice of it
        shape = shape.args[0]
    return shape.args[0]


def _is_of_sizes(node: fx.Node) -> bool:
    """Return whether this is computed from sizes of tensors alone."""
    if is_shape(node) or node.target == "size":
        return True
    return node.op == "call_function" and bool(node.all_input_nodes) and all(map(_is_of_sizes, node.all_input_nodes))


def _function_of(module: nn.Module) -> Callable[[nn.Module, Tensor], Tensor] | None:
    """Return the function that runs a module in a program; None: it is called itself."""
    if convolution.has_a_better_way(module):
        return convolution.conv3d
    return deterministic_pools.pool3d if type(module) in deterministic_pools.POOLS else None


class DenseNetwork(nn.Module):
    """Runs a network without sampling, by its program where that computes the same in a better way.

    That is on CPUs (see `cpu`), on GPUs for depthwise convolutions (see `kernels.depthwise`), and where deterministic
    algorithms are asked for (see `deterministic_pools`). A network that cannot be traced, whose modules were replaced, or that has hooks on modules that the program does not call, runs
    as it is.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.program: fx.GraphModule | None = None
        try:
            traced = Traced(network, {})
        except ValueError:
            return
        self.program = traced.whole()
        self._children = [(parent, name, child) for parent in network.modules() for name, child in parent.named_children()]
        called = {network.get_submodule(node.target) for node in traced.nodes if node.op == "call_module"}
        self._depthwise = any(map(depthwise.is_depthwise, called))
        self._inlined = [module for module in network.modules() if module not in called]

    def __reduce__(self) -> tuple:
        """A pickled or deep copy traces the network anew: a pickled program would lose functions that take modules."""
        return type(self), (self.network,)

    def forward(self, clips: Tensor) -> Any:
        return self._preferred(clips)(clips)

    def _preferred(self, clips: Tensor) -> nn.Module:
        if self.program is None or torch.compiler.is_compiling():
            return self.network
        kernels = self._depthwise and support.triton_runs(clips.device)
        if clips.device.type != "cpu" and not kernels and not torch.are_deterministic_algorithms_enabled():
            return self.network
        replaced = any(getattr(parent, name, None) is not child for parent, name, child in self._children)
        return self.network if replaced or any(map(cpu.has_hooks, self._inlined)) else self.program


def _trace(network: nn.Module) -> tuple[list[fx.Node], dict[str, fx.Node]]:
    """Return the nodes of the network's graph, and the node of each module's output.

    Raises:
        ValueError: torch.fx cannot trace it, or not for training and evaluation alike; names the line of its code.
    """
    graphs = []
    for training in (True, False):
        tracer = _LeafTracer()
        with probing.in_mode(network, training=training):
            try:
                graphs.append(list(tracer.trace(network).nodes))
            except Exception as error:  # the network's own code runs on stand-ins of tensors, and raises whatever it does
                own = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith((TORCH, __file__, "<"))]
                line = f"{own[-1].filename}:{own[-1].lineno}" if own else "an unknown line"
                raise ValueError(
                    f"torch.fx cannot trace {type(network).__name__}, which SGS, trainer.checkpoint_activations and trainer.compile need: {probing.first_line(error)} at {line}; write that without Python's range, if, int"
                    " or unpacking of tensors and their sizes, or give the module a packed_forward (atfr/models/packed/registry.py): it is then a leaf of the graph"
                ) from error
    different = _first_difference(*graphs)
    if different is not None:
        raise ValueError(
            f"torch.fx traces {type(network).__name__} differently for training and evaluation, at {different.name!r}, so SGS, trainer.checkpoint_activations and trainer.compile cannot use it:"
            " where its forward reads self.training, use a module (nn.Dropout for nn.functional.dropout)"
        )
    return graphs[-1], tracer.outputs


def _first_difference(one: Sequence[fx.Node], other: Sequence[fx.Node]) -> fx.Node | None:
    """Return the first node of one graph that differs from the other's, if any."""
    index = {node: str(i) for nodes in (one, other) for i, node in enumerate(nodes)}

    def content(node: fx.Node) -> tuple:
        target = "" if node.op == "get_attr" else node.target  # constants have other names in each trace
        return node.op, target, str(fx.map_arg(node.args, index.__getitem__)), str(fx.map_arg(node.kwargs, index.__getitem__))

    return next((a for a, b in zip(one, other) if content(a) != content(b)), None)


class _LeafTracer(fx.Tracer):
    """Stops at torch's own modules, at those with a packed form and at those that read `self.training`; keeps each module's output."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[str, fx.Node] = {}

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        code = getattr(type(module).forward, "__code__", None)
        reads_mode = code is not None and "training" in code.co_names and not any(module.children())
        return reads_mode or registry.is_leaf(module) or super().is_leaf_module(module, name)

    def call_module(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> object:
        output = super().call_module(module, forward, args, kwargs)
        if isinstance(output, fx.Proxy):
            self.outputs[self.path_of_module(module)] = output.node
        return output
