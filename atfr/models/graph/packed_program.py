"""Writes the program of everything behind the first sampling, for clips that keep different numbers of features.

In the `trunk` every operation over time is replaced by its packed form, and the others run as they are. For the `stem`,
everything that does not depend on a sampled feature, see `tracing`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Callable, Mapping, NamedTuple, Sequence

from torch import Tensor, fx, nn

from atfr.models.graph.tracing import Traced, is_shape, read_by_batch_size
from atfr.models.packed import ops, registry
from atfr.models.packed.registry import NoPackedForm
from atfr.models.packed.segments import Segments, Window
from atfr.models.sgs.sampling import Forced, sample


@dataclass(frozen=True)
class Time:
    """What the lengths of packed features depend on: the layer that sampled them, and the windows of the operations since.

    Behind a module with a `packed_forward` the source is that module, of which no more is known than its `inputs`.
    """

    source: str
    windows: tuple[Window, ...] = ()
    inputs: tuple[Time, ...] = ()

    def by_layer(self) -> list[Time]:
        """Return one Time for each layer that these lengths depend on, as if modules gave out the lengths that they are given."""
        if not self.inputs:
            return [self]
        return [Time(time.source, time.windows + self.windows) for given in self.inputs for time in given.by_layer()]

    def lengths(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Return the lengths here of clips that kept these at the source; 0 where a clip is too short."""
        for window in self.windows:
            lengths = [max(window.out(length), 0) if length else 0 for length in lengths]
        return tuple(lengths)

    def fits(self, other: Time) -> bool:
        """Return whether features of both times always have the same lengths."""
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


class PackedTrunk:
    """The trunk of a traced network for packed features.

    Args:
        layer_path: the path of the SGS layer with this name in the program.

    Attributes:
        graph: of the program, see `module`.
        times: the Time of each packed value, by the name of its node in `graph`.
        inputs: the Time of what is given to each layer behind another one.

    Raises:
        NoPackedForm: a module or function is not known to be framewise and has no packed form.
        ValueError: an operation joins sampled features with ones that bypass sampling.
    """

    def __init__(self, traced: Traced, layer_path: Callable[[str], str]) -> None:
        self.traced, self.layer_path = traced, layer_path
        self.graph = fx.Graph()
        self.values = {node: Value(self.graph.placeholder(node.name)) for node in traced.frontier}
        self.forced = self.graph.placeholder("forced")
        self.decision = self.graph.placeholder("decision", default_value=None)
        self.done: dict[fx.Node, fx.Node] = {}
        self.times: dict[str, Time] = {}
        self.gaps: list[int | None] = []  # that the trunk's operations need, see PackedOp
        self.inputs: dict[str, Time] = {}
        later = sorted((n for n in traced.nodes if traced.level[n] > 0 or n.op == "get_attr"), key=traced.level.__getitem__)
        levels = {traced.level[cuts[0]]: cuts for cuts in traced.levels}
        self._sample(levels.pop(0))
        segments = self.values[traced.levels[0][0]].segments
        self.values.update({node: Value(self.graph.call_function(_num_clips, (segments,))) for node in traced.batch_sizes})
        for node in later:
            below = traced.level[node] - 1
            if below in levels:
                self._sample(levels.pop(below))
            if node.op == "output":
                result = self.graph.node_copy(node, lambda n: self.values[n].node).args[0]
                self.graph.erase_node(next(n for n in reversed(self.graph.nodes) if n.op == "output"))
                self.graph.output((result, tuple(self.done[cut] for cut in traced.cuts)))
            else:
                value = self.values[node] = self._write(node)
                if value.time is not None:
                    self.times[value.node.name] = value.time

    def module(self, layers: Mapping[str, nn.Module]) -> fx.GraphModule:
        """Return the program with the SGS layers {path: layer}.

        It maps (the frontier, forced, decision) to (the network's output, one row a clip; a tuple of Sampled, one a layer in
        the order of the cuts). For `forced` and `decision`, which is that of the first level, see `sgs.sampling.sample`.
        """
        return self.traced.program(self.graph, "PackedTrunk", layers)

    def least_bins(self) -> dict[str, int]:
        """Return the fewest features of each layer that everything behind it can run on."""
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
        """The gap between clips that serves all operations of the trunk; 0 if none needs one, or if one of them cannot run with gaps."""
        known = [gap for gap in self.gaps if gap is not None]
        if len(self.traced.cuts) > 1 or len(known) < len(self.gaps):
            return 0
        return max(known, default=0)

    def _sample(self, cuts: list[fx.Node]) -> None:
        """Sample the features of these nodes together; nodes behind them read what was kept."""
        names = [self.traced.cuts[cut] for cut in cuts]
        self.inputs.update({name: time for name, cut in zip(names, cuts) if (time := self.values[cut].time) is not None})
        layers = tuple(self.graph.get_attr(self.layer_path(name)) for name in names)
        features = tuple(self.values[cut].node for cut in cuts)
        segments = tuple(self.values[cut].segments for cut in cuts)
        order = list(self.traced.cuts)
        forced = self.graph.call_function(_forced, (self.forced, tuple(order.index(cut) for cut in cuts)))
        first = cuts == self.traced.levels[0]
        clip = self.values[self.traced.nodes[0]].node if first and self.traced.embeds_clip else None
        result = self.graph.call_function(sample, (layers, features, segments, forced, clip, self.decision if first else None))
        for i, (cut, name) in enumerate(zip(cuts, names)):
            kept = self.graph.call_function(_item, (result, 0, i))
            self.done[cut] = self.graph.call_function(_item, (result, 1, i))
            after = self.graph.call_function(getattr, (self.done[cut], "segments"))
            self.values[cut] = Value(kept, Time(name), after)
            self.times[kept.name] = Time(name)

    def _write(self, node: fx.Node) -> Value:
        inputs = [self.values[i] for i in node.all_input_nodes]
        sampled = [value for value in inputs if value.time is not None]
        times = [value.time for value in inputs if value.time is not None]
        if not sampled:
            return Value(self._copy(node), per_clip=any(value.per_clip for value in inputs))
        if node.op == "call_module":
            module = self.traced.network.get_submodule(node.target)
            if hasattr(module, "packed_forward"):
                return self._write_own(node)
            return self._write_module(node, registry.packed_op(module, node.target), sampled[0], times[0])
        if read_by_batch_size(node) is not None:
            return Value(self.graph.call_function(_num_clips, (sampled[0].segments,)))
        if registry.begins_mean(node) or (is_shape(node) and all(is_shape(user) or read_by_batch_size(user) is not None for user in node.users)):
            return sampled[0]  # what follows reads the features themselves
        for run, keepdim, gap in ((ops.mean, registry.mean_over_clip(node), 0), (ops.maximum, registry.maximum_over_clip(node), None)):
            if keepdim is not None:
                (value,) = sampled
                self.gaps.append(gap)
                return Value(self.graph.call_function(run, (value.node, value.segments), {"keepdim": keepdim}), per_clip=True)
        if not registry.is_framewise(node):
            raise NoPackedForm(f"{node.name!r} ({node.target}) behind SGS has no packed form: it may mix the features of different clips")
        self._check_joined(node, times)
        substitutes = {
            i: self.graph.call_function(ops.repeat_per_feature, (self.values[i].node, sampled[0].segments))
            for i in node.all_input_nodes
            if self.values[i].per_clip
        }
        return Value(self._copy(node, substitutes), sampled[0].time, sampled[0].segments)

    def _write_module(self, node: fx.Node, form: registry.PackedOp, value: Value, time: Time) -> Value:
        self.gaps.append(form.gap)
        if form.run is None:
            return Value(self._copy(node), value.time, value.segments)
        module = self.graph.get_attr(node.target)
        result = self.graph.call_function(form.run, (module, value.node, value.segments))
        if form.per_clip:
            return Value(result, per_clip=True)
        if form.window.stride == 1 and form.window.out(1) == 1:
            return Value(result, value.time, value.segments)
        segments = self.graph.call_function(Segments.after, (value.segments, form.window))
        return Value(result, replace(time, windows=(*time.windows, form.window)), segments)

    def _write_own(self, node: fx.Node) -> Value:
        """Write a module that has a `packed_forward`, whose output may have other lengths than its inputs."""
        if node.kwargs:
            raise NoPackedForm(f"{node.target} behind SGS has no packed form: packed_forward takes its inputs by position, not as {', '.join(node.kwargs)}")
        pairs = []
        for value in (self.values[i] for i in node.args):
            if value.time is None:  # all frames
                pairs.append((self.graph.call_function(ops.pack, (value.node,)), self.graph.call_function(_whole, (value.node,))))
            else:
                pairs.append((value.node, value.segments))
        self.gaps.append(None)
        module = self.graph.get_attr(node.target)
        result = self.graph.call_function(_packed_forward, (module, *pairs))
        out, segments = (self.graph.call_function(operator.getitem, (result, i)) for i in range(2))
        times = tuple(time for i in node.args if (time := self.values[i].time) is not None)
        return Value(out, Time(node.name, inputs=times), segments)

    def _check_joined(self, node: fx.Node, times: list[Time]) -> None:
        for i in node.all_input_nodes:
            value = self.values[i]
            if value.time is None and not value.per_clip and i.op != "get_attr" and read_by_batch_size(i) is None:
                raise ValueError(
                    f"SGS cannot be put behind {', '.join(self.traced.cuts.values())}: {node.name!r} also needs {i.name!r} from before it, which keeps all frames"
                )
        for time in times[1:]:
            if not time.fits(times[0]):
                raise ValueError(f"{node.name!r} joins features that were sampled in different ways, behind {times[0].source} and {time.source}")

    def _copy(self, node: fx.Node, substitutes: Mapping[fx.Node, fx.Node] = {}) -> fx.Node:
        copies = {i: substitutes.get(i, self.values[i].node) for i in node.all_input_nodes}
        return self.traced.copy(self.graph, node, copies)


def is_sampling(node: fx.Node) -> bool:
    """Return whether an operation of a packed trunk samples, or reads what sampling returned."""
    return node.target in (sample, _forced, _item) or (node.target is getattr and node.args[0].target is _item)


def holds_no_tensor(node: fx.Node) -> bool:
    """Return whether a value of a packed trunk takes no memory: lengths, and the record of a sampling."""
    features = node.target is _item and node.args[1] == 0
    return (is_sampling(node) and not features) or node.target in (Segments.after, _whole, _num_clips) or node.name in ("forced", "decision")


def _forced(forced: Forced | None, layers: tuple[int, ...]) -> list | None:
    return None if forced is None else [forced[i] for i in layers]


def _item(values: tuple, first: int, second: int) -> object:
    return values[first][second]


def _whole(x: Tensor) -> Segments:
    return Segments.whole(int(x.shape[0]), int(x.shape[2]), x.device)  # tensors, while fvcore traces


def _num_clips(segments: Segments) -> int:
    return len(segments.lengths)


def _packed_forward(module: nn.Module, *pairs: tuple[Tensor, Segments]) -> tuple[Tensor, Segments]:
    return module.packed_forward(*pairs)
