"""A network with SGS inside, as two programs: what runs before the first sampling, and the rest.

`torch.fx` traces the network into a graph of its leaf modules. What does not depend on any sampled
feature is the `stem` and runs on a batch of clips as always. In the rest, the `trunk`, every
operation that looks along time is replaced by its packed form. Both call the network's own
modules, so its parameters, their names and its checkpoints stay as they are.

Layers that do not depend on each other (the two pathways of a SlowFast) sample together; a layer
behind another one is a *level* of its own.
"""

from __future__ import annotations

import operator
import traceback
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Callable, Mapping, NamedTuple, Sequence

import torch
from torch import Tensor, fx, nn

from atfr.models.graph import probing
from atfr.models.packed import ops, registry
from atfr.models.packed.registry import NoPackedForm
from atfr.models.packed.segments import Segments, Window
from atfr.models.sgs.layer import Forced, sample

TORCH = str(Path(torch.__file__).parent)
INPUT = "input"  # a place before all modules: the clips themselves are sampled


@dataclass(frozen=True)
class Time:
    """What the lengths of packed features depend on: where they were sampled, and the windows since."""

    source: str
    windows: tuple[Window, ...] = ()

    def lengths(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """The lengths here of clips that went on from the source with these; 0 where a clip is too short."""
        for window in self.windows:
            lengths = [max(window.out(length), 0) if length else 0 for length in lengths]
        return tuple(lengths)

    def fits(self, other: Time) -> bool:
        """Whether features of both times always have the same lengths."""
        return self.source == other.source and _profile(self) == _profile(other)


@lru_cache(maxsize=1024)
def _profile(time: Time) -> tuple[int, ...]:
    return time.lengths(range(1, 129))


class Value(NamedTuple):
    """A value of the trunk: dense (no time, no clip), packed (a time and segments) or one per clip."""

    node: fx.Node
    time: Time | None = None
    segments: fx.Node | None = None
    per_clip: bool = False


class Traced:
    """A network's graph, the nodes that are sampled, and each node's level."""

    def __init__(self, network: nn.Module, places: Mapping[str, str], *, before_activation: bool, looks: bool = False) -> None:
        self.looks = looks  # whether the layers look at the clip, which then passes the stem by
        tracer = _LeafTracer()
        self.network = network
        self.nodes = _trace(tracer, network)
        tracer.outputs.setdefault(INPUT, self.nodes[0])
        self.cuts: dict[fx.Node, str] = {}  # node -> name of the layer behind it
        for name, path in places.items():
            if path not in tracer.outputs:
                raise ValueError(f"model.sgs.after={name!r}: there is no module {path!r} with an output to sample")
            cut = tracer.outputs[path]
            if before_activation and cut.op == "call_module" and isinstance(network.get_submodule(cut.target), nn.ReLU):
                cut = cut.args[0]
            if cut in self.cuts:
                raise ValueError(f"model.sgs.after names the same place twice: {self.cuts[cut]} and {name}")
            self.cuts[cut] = name
        self.level: dict[fx.Node, int] = {}
        for node in self.nodes:
            self.level[node] = max((self.level[i] + (i in self.cuts) for i in node.all_input_nodes), default=0)

    @property
    def levels(self) -> list[list[fx.Node]]:
        """The sampled nodes, those that sample together in one list."""
        depths = sorted({self.level[cut] for cut in self.cuts})
        return [[cut for cut in self.cuts if self.level[cut] == depth] for depth in depths]

    @property
    def frontier(self) -> list[fx.Node]:
        """What the stem hands over: the features to sample first, then the clip where it is looked at, then whatever passes them by."""
        first = self.levels[0]
        clip = [self.nodes[0]] if self.looks and self.nodes[0] not in first else []
        later = [n for n in self.nodes if self.level[n] > 0]
        passing = {i: None for n in later for i in n.all_input_nodes if self.level[i] == 0 and i.op != "get_attr" and i not in first}
        return first + clip + [node for node in passing if node not in clip]

    def stem(self, root: nn.Module, prefix: str, outputs: Sequence[fx.Node] | None = None) -> fx.GraphModule:
        """Clips [N, 3, T, H, W] -> the frontier, or other outputs, as a tuple."""
        outputs = self.frontier if outputs is None else list(outputs)
        needed = set(outputs)
        for node in reversed(self.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
        graph, copies = fx.Graph(), {}
        for node in self.nodes:
            if node in needed or node.op == "placeholder":
                copies[node] = _copy(graph, node, copies, prefix)
        graph.output(tuple(copies[node] for node in outputs))
        return fx.GraphModule(root, graph, "Stem")

    def whole(self, root: nn.Module, prefix: str) -> fx.GraphModule:
        """Clips -> what the network makes of them, nothing sampled."""
        graph, copies = fx.Graph(), {}
        for node in self.nodes:
            copies[node] = _copy(graph, node, copies, prefix)
        return fx.GraphModule(root, graph, "Network")

    def plain_trunk(self, root: nn.Module, prefix: str) -> fx.GraphModule:
        """The frontier, its features sampled already and all of one length -> the network's output."""
        graph = fx.Graph()
        copies = {node: graph.placeholder(node.name) for node in self.frontier}
        for node in self.nodes:
            if self.level[node] > 0 or node.op == "get_attr":
                copies[node] = _copy(graph, node, copies, prefix)
        return fx.GraphModule(root, graph, "PlainTrunk")


class PackedTrunk:
    """Writes the trunk of a traced network for packed features.

    Attributes:
        graph: of the trunk's program, see `module`.
        times: of each packed value, by the name of its node in `graph`.

    Raises:
        NoPackedForm: for a module or function that is not known to be framewise and has no packed
            form.
        ValueError: for a value that passes the sampling by and meets what was sampled.
    """

    def __init__(self, traced: Traced, prefix: str, layer_path: Callable[[str], str]) -> None:
        self.traced, self.prefix, self.layer_path = traced, prefix, layer_path
        self.graph = fx.Graph()
        self.values = {node: Value(self.graph.placeholder(node.name)) for node in traced.frontier}
        self.forced = self.graph.placeholder("forced")
        self.done: dict[fx.Node, fx.Node] = {}
        self.times: dict[str, Time] = {}
        self.needed: list[int | None] = []  # the gaps that the trunk's operations can share, see PackedOp
        self.inputs: dict[str, Time] = {}  # of each layer behind another one
        later = sorted((n for n in traced.nodes if traced.level[n] > 0 or n.op == "get_attr"), key=traced.level.__getitem__)
        levels = {traced.level[cuts[0]]: cuts for cuts in traced.levels}
        self._sample(levels.pop(0))
        for node in later:
            below = traced.level[node] - 1
            if below in levels:
                self._sample(levels.pop(below))
            if node.op == "output":
                result = self.graph.node_copy(node, lambda n: self.values[n].node).args[0]
                self.graph.erase_node(next(n for n in reversed(self.graph.nodes) if n.op == "output"))
                self.graph.output((result, tuple(self.done[cut] for cut in traced.cuts)))
            else:
                self.values[node] = self._write(node)
                if self.values[node].time is not None:
                    self.times[self.values[node].node.name] = self.values[node].time

    def module(self, root: nn.Module) -> fx.GraphModule:
        """Return the trunk: (the stem's outputs, forced) -> (the network's output, one row a clip; a tuple of Sampled, one a layer)."""
        return fx.GraphModule(root, self.graph, "PackedTrunk")

    def least_bins(self) -> dict[str, int]:
        """For each layer, the fewest features that everything behind it can run on."""
        least = {name: 1 for name in self.traced.cuts.values()}
        for cuts in reversed(self.traced.levels):
            for name in (self.traced.cuts[cut] for cut in cuts):
                needs = [(time, 1) for time in self.times.values() if time.source == name]
                needs += [(time, least[layer]) for layer, time in self.inputs.items() if time.source == name]
                while any(time.lengths([least[name]])[0] < need for time, need in needs):
                    least[name] += 1
        return least

    @property
    def gap(self) -> int:
        """The gap between clips with which all operations of the trunk keep them apart; 0 where they do not need one, or some cannot use it."""
        if len(self.traced.cuts) > 1:
            return 0
        return 0 if None in self.needed else max(self.needed, default=0)

    def _sample(self, cuts: list[fx.Node]) -> None:
        """Sample the features of these nodes together; who reads them from now on reads what was kept."""
        names = [self.traced.cuts[cut] for cut in cuts]
        self.inputs.update({name: self.values[cut].time for name, cut in zip(names, cuts) if self.values[cut].time})
        layers = tuple(self.graph.get_attr(self.layer_path(name)) for name in names)
        features = tuple(self.values[cut].node for cut in cuts)
        segments = tuple(self.values[cut].segments for cut in cuts)
        order = list(self.traced.cuts)
        forced = self.graph.call_function(_forced, (self.forced, tuple(order.index(cut) for cut in cuts)))
        looks = self.traced.looks and cuts == self.traced.levels[0]
        clip = self.values[self.traced.nodes[0]].node if looks else None
        result = self.graph.call_function(sample, (layers, features, segments, forced, clip))
        for i, (cut, name) in enumerate(zip(cuts, names)):
            kept = self.graph.call_function(_item, (result, 0, i))
            self.done[cut] = self.graph.call_function(_item, (result, 1, i))
            after = self.graph.call_function(getattr, (self.done[cut], "segments"))
            self.values[cut] = Value(kept, Time(name), after)
            self.times[kept.name] = Time(name)

    def _write(self, node: fx.Node) -> Value:
        inputs = [self.values[i] for i in node.all_input_nodes]
        sampled = [value for value in inputs if value.time is not None]
        if not sampled:
            return Value(self._copied(node), per_clip=any(value.per_clip for value in inputs))
        if node.op == "call_module":
            module = self.traced.network.get_submodule(node.target)
            if hasattr(module, "packed_forward"):
                return self._write_own(node)
            return self._write_module(node, registry.packed_op(module, node.target), sampled[0])
        keepdim = registry.mean_over_clip(node)
        if keepdim is not None:
            (value,) = sampled
            return Value(self.graph.call_function(ops.mean, (value.node, value.segments), {"keepdim": keepdim}), per_clip=True)
        if not registry.is_framewise(node):
            raise NoPackedForm(f"{node.name!r} ({node.target}) behind SGS has no packed form: it may mix the features of different clips")
        self._check_joined(node, sampled)
        substitutes = {
            i: self.graph.call_function(ops.spread, (self.values[i].node, sampled[0].segments))
            for i in node.all_input_nodes
            if self.values[i].per_clip
        }
        return Value(self._copied(node, substitutes), sampled[0].time, sampled[0].segments)

    def _write_module(self, node: fx.Node, form: registry.PackedOp, value: Value) -> Value:
        self.needed.append(form.gap)
        if form.run is None:
            return Value(self._copied(node), value.time, value.segments)
        module = self.graph.get_attr(self.prefix + node.target)
        result = self.graph.call_function(form.run, (module, value.node, value.segments))
        if form.per_clip:
            return Value(result, per_clip=True)
        if form.window.stride == 1 and form.window.out(1) == 1:
            return Value(result, value.time, value.segments)
        segments = self.graph.call_function(Segments.through, (value.segments, form.window))
        return Value(result, Time(value.time.source, (*value.time.windows, form.window)), segments)

    def _write_own(self, node: fx.Node) -> Value:
        """A module with a packed form of its own, whose output may have lengths of its own."""
        if node.kwargs:
            raise NoPackedForm(f"{node.target} behind SGS has no packed form: packed_forward takes its inputs by position, not as {', '.join(node.kwargs)}")
        pairs = []
        for value in (self.values[i] for i in node.args):
            if value.time is None:  # keeps all its frames
                pairs.append((self.graph.call_function(ops.pack, (value.node,)), self.graph.call_function(_whole, (value.node,))))
            else:
                pairs.append((value.node, value.segments))
        self.needed.append(None)
        module = self.graph.get_attr(self.prefix + node.target)
        result = self.graph.call_function(_packed_forward, (module, *pairs))
        out, segments = (self.graph.call_function(operator.getitem, (result, i)) for i in range(2))
        return Value(out, Time(node.name), segments)

    def _check_joined(self, node: fx.Node, sampled: list[Value]) -> None:
        for i in node.all_input_nodes:
            value = self.values[i]
            if value.time is None and not value.per_clip and i.op != "get_attr":
                raise ValueError(
                    f"SGS cannot be put behind {', '.join(self.traced.cuts.values())}: {node.name!r} also needs {i.name!r} from before it, which keeps all frames"
                )
        for value in sampled[1:]:
            if not value.time.fits(sampled[0].time):
                raise ValueError(f"{node.name!r} joins features that were sampled in different ways, behind {sampled[0].time.source} and {value.time.source}")

    def _copied(self, node: fx.Node, substitutes: Mapping[fx.Node, fx.Node] = {}) -> fx.Node:
        copies = {i: substitutes.get(i, self.values[i].node) for i in node.all_input_nodes}
        return _copy(self.graph, node, copies, self.prefix)


def _trace(tracer: fx.Tracer, network: nn.Module) -> list[fx.Node]:
    """The nodes of the network's graph.

    Raises:
        ValueError: torch.fx cannot trace it; says where in the network's code and what to do.
    """
    try:
        return list(tracer.trace(network).nodes)
    except Exception as error:  # the network's own code runs on stand-ins of tensors, and raises whatever it does
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith((TORCH, __file__, "<"))]
        place = f"{own[-1].filename}:{own[-1].lineno}" if own else "an unknown place"
        raise ValueError(
            f"torch.fx cannot trace {type(network).__name__}, which SGS, trainer.checkpoint_activations and trainer.compile need: {probing.first_line(error)} at {place}; write that without Python's range, if, int"
            " or unpacking of tensors and their sizes, or give the module a packed_forward (atfr/models/packed/registry.py): it is then taken as a whole"
        ) from error


class _LeafTracer(fx.Tracer):
    """Stops at torch's own modules and at those with a packed form; remembers each module's output."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[str, fx.Node] = {}

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return registry.is_leaf(module) or super().is_leaf_module(module, name)

    def call_module(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> object:
        output = super().call_module(module, forward, args, kwargs)
        if isinstance(output, fx.Proxy):
            self.outputs[self.path_of_module(module)] = output.node
        return output


def _copy(graph: fx.Graph, node: fx.Node, copies: Mapping[fx.Node, fx.Node], prefix: str) -> fx.Node:
    copied = graph.node_copy(node, copies.__getitem__)
    if node.op in ("call_module", "get_attr"):
        copied.target = prefix + node.target
    return copied


def is_sampling(node: fx.Node) -> bool:
    """Whether an operation of a packed trunk samples, or reads what a sampling gave."""
    return node.target in (sample, _forced, _item) or (node.target is getattr and node.args[0].target is _item)


def holds_no_tensor(node: fx.Node) -> bool:
    """Whether a value of a packed trunk is of no size: lengths, and what the sampling did."""
    features = node.target is _item and node.args[1] == 0
    return (is_sampling(node) and not features) or node.target in (Segments.through, _whole) or node.name == "forced"


def _forced(forced: Forced | None, layers: tuple[int, ...]) -> list | None:
    return None if forced is None else [forced[i] for i in layers]


def _item(values: tuple, first: int, second: int) -> object:
    return values[first][second]


def _whole(x: Tensor) -> Segments:
    return Segments.whole(x.shape[0], x.shape[2], x.device)


def _packed_forward(module: nn.Module, *pairs: tuple[Tensor, Segments]) -> tuple[Tensor, Segments]:
    return module.packed_forward(*pairs)
