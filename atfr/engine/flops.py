"""GFLOPs of each clip, by how many temporal features it kept.

Convention: fvcore's, one multiply-add is one FLOP; batch norm is not counted; the sampling layer
itself is. Costs are looked up in a table with one fvcore analysis per distinct B', since the cost
of a trunk with temporal strides is a staircase in B' that no formula gives. Of the sampling layer the
embedding and the aggregation are counted; the elementwise work of comparing frames is not, which fvcore leaves out.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any, Sequence

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, fx, nn

from atfr.models.graph.packed_program import Time
from atfr.models.packed import cpu, ops
from atfr.models.packed.segments import Segments, shared_gap
from atfr.models.sgs.layer import sample
from atfr.models.video_net import VideoNet

CONVENTION = "fvcore: one multiply-add = one FLOP, batch norm excluded, sampling layer included, one clip (view)"


class GflopsTable:
    """What a clip of `clip_shape` (3, T, H, W) costs `model`, dense and for each B' it may keep.

    Attributes:
        dense: GFLOPs of the backbone without sampling.
        frames: T at each layer; empty for a dense network.
        most, least: the most and the fewest features that a clip may keep at each layer.
    """

    def __init__(self, model: VideoNet, clip_shape: tuple[int, int, int, int]) -> None:
        # fvcore traces in Python; a copy on the CPU leaves the model, its device and its mode alone.
        self._model = copy.deepcopy(model).cpu().eval()
        clip = torch.zeros(1, *clip_shape)
        self.dense = gflops(self._model.backbone, clip)
        self.frames = self.most = self.least = ()
        self._by_bins: dict[tuple[int, ...], float] = {}
        if not model.sgs:
            return
        layers = list(self._model.sgs.values())
        self.least = tuple(layer.min_bins for layer in layers)
        with torch.no_grad():
            self._features = self._model.stem(clip)
            self._waste = _Waste(self._model, self._features, self.least, next(model.parameters()).device)
        self.frames = self._waste.frames
        self.most = tuple(min(layer.most_bins(frames), frames) for layer, frames in zip(layers, self.frames))
        self._stem = gflops(_Stem(self._model), clip)

    def at(self, bins: tuple[int, ...]) -> float:
        """GFLOPs of a clip that keeps `bins` features, one number a layer: stem, sampling and trunk."""
        if not self.frames:
            return self.dense
        if bins not in self._by_bins:
            self._by_bins[bins] = gflops(_Trunk(self._model, [bins]), self._features)
        return self._stem + self._by_bins[bins]

    def executed(self, batch: Sequence[tuple[int, ...]]) -> float:
        """GFLOPs that a batch of clips with these B' runs in evaluation.

        Beyond their sum these are the gaps between packed clips, and the sampling layer summing
        as many bins for each clip as the longest one has.
        """
        total = sum(self.at(bins) for bins in batch)
        return total + self._waste(batch) if self.frames else total


def gflops(module: nn.Module, example: Tensor | tuple[Tensor, ...]) -> float:
    """GFLOPs of one forward of `module`, in the convention above."""
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    analysis = FlopCountAnalysis(module, example)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    # Not None, which fvcore documents but which leaves its own batch norm handle in place.
    analysis.set_op_handle("aten::batch_norm", lambda inputs, outputs: 0)
    return analysis.total() / 1e9


class _Stem(nn.Module):
    """Everything whose cost does not depend on B'."""

    def __init__(self, model: VideoNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, clips: Tensor) -> tuple[Tensor, ...]:
        return self.model.stem(clips)


class _Trunk(nn.Module):
    """Sampling and trunk of clips made to keep the given numbers of features."""

    def __init__(self, model: VideoNet, batch: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.model, self.forced = model, list(zip(*batch))

    def forward(self, *features: Tensor) -> tuple[Tensor, ...]:
        logits, sampled = self.model.trunk(*features, forced=self.forced)
        # What a layer would have done is returned, too: tracing drops what leads to nothing.
        return logits, *(done.proposal.weights for done in sampled)


@dataclass(frozen=True)
class _Convolution:
    """A packed convolution, the time of its input, and what one output position costs."""

    module: nn.Conv3d
    time: Time
    gflops: float


class _Waste(fx.Interpreter):
    """GFLOPs of a packed batch beyond those of its clips, from one look at each of the trunk's operations."""

    def __init__(self, model: VideoNet, features: Sequence[Tensor], bins: tuple[int, ...], device: torch.device) -> None:
        self.device = device
        self.times, self.inputs = model.times, model.layer_inputs
        self.names = [layer.name for layer in model.sgs.values()]
        self.gap = next(iter(model.sgs.values())).gap
        self.convolutions: list[_Convolution] = []  # that look along time
        self.framewise = 0.0  # GFLOPs of one place in all others, and in means over time
        self.sizes: dict[str, float] = {}  # of one frame that a layer sums into a bin, in billions of values
        _, done = model.trunk(*features, forced=[(b,) for b in bins])
        self.frames = tuple(s.segments.frames for s in done)
        if model.execution == "packed":
            super().__init__(model.packed_trunk)
            self.run(*features, [(b,) for b in bins])
        else:
            self.sizes = {name: x.numel() / x.shape[2] / 1e9 for name, x in zip(self.names, features)}

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if node.target is ops.conv3d:
            module = self.fetch_attr(node.args[0].target)
            cost = module.weight.numel() * result[0, 0, 0].numel() / 1e9
            self.convolutions.append(_Convolution(module, self.times[node.args[1].name], cost))
        elif (node.op == "call_module" or node.target is cpu.conv3d) and node.name in self.times:
            module = self.fetch_attr(node.target if node.op == "call_module" else node.args[0].target)
            if not isinstance(module, nn.Conv3d):
                return result
            self.framewise += module.weight.numel() * result[0, 0, 0].numel() / 1e9
        elif node.target in (ops.squeeze_excitation, ops.global_pool, ops.mean):
            x = self.env[node.args[0 if node.target is ops.mean else 1]]
            self.framewise += x[0, :, 0].numel() / 1e9
        elif node.target is sample:
            layers, features = self.map_nodes_to_values(node.args[:2], node)
            self.sizes.update({layer.name: x[0, :, 0].numel() / 1e9 for layer, x in zip(layers, features)})
        return result

    def __call__(self, batch: Sequence[tuple[int, ...]]) -> float:
        bins = dict(zip(self.names, zip(*batch)))
        gap = shared_gap(bins[self.names[0]], self.gap, self.device)
        if gap:  # all of the trunk runs on its places
            shared = Segments(bins[self.names[0]], self.frames[0], torch.zeros(0), gap)
            total = (shared.num_slots - sum(shared.lengths)) * (self.framewise + sum(c.gflops for c in self.convolutions))
        else:
            total = sum(c.gflops * ops.extra_outputs(c.module, c.time.lengths(bins[c.time.source]), self.device) for c in self.convolutions if c.time.source in bins)
        for name, frames in zip(self.names, self.frames):
            time = self.inputs.get(name)
            given = (frames,) * len(batch) if time is None else time.lengths(bins[time.source]) if time.source in bins else bins[name]
            rows = max(bins[name]) * max(given) * len(batch) - sum(b * g for b, g in zip(bins[name], given))
            total += self.sizes[name] * rows
        return total
