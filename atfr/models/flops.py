"""GFLOPs of each clip, by how many temporal features it kept.

Convention: fvcore's, one multiply-add is one FLOP; batch norm is not counted; the sampling layer
itself is. Reported costs come from a table with one fvcore analysis per distinct B';
calibration estimates them from a few (`GflopsTable.estimate`). Of the sampling layer the
embedding and the aggregation are counted; the elementwise work of comparing frames is not, which fvcore leaves out.
"""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Sequence

import numpy as np
import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

if TYPE_CHECKING:
    from atfr.models.video_net import VideoNet

CONVENTION = "fvcore: one multiply-add = one FLOP, batch norm excluded, sampling layer included, one clip (view)"

LINEAR = 0.02  # how far an estimate may be from an analysis, as a share


class GflopsTable:
    """What a clip of `clip_shape` (3, T, H, W) costs `model`, dense and for each B' it may keep.

    Attributes:
        dense: GFLOPs of the network without sampling.
        frames: T at each layer; empty for a dense network.
        most, least: the most and the fewest features that a clip may keep at each layer.
        depths: how many layers lie in front of each layer.
    """

    def __init__(self, model: VideoNet, clip_shape: tuple[int, ...]) -> None:
        # fvcore traces in Python; a copy on the CPU leaves the model, its device and its mode alone.
        self._model = copy.deepcopy(model).cpu().eval()
        clip = torch.zeros(1, *clip_shape)
        self.dense = gflops(self._model.dense_network, clip)
        self.frames: tuple[int, ...] = ()
        self.most: tuple[int, ...] = ()
        self.least: tuple[int, ...] = ()
        self.depths: tuple[int, ...] = ()
        self._by_bins: dict[tuple[int, ...], float] = {}
        if not model.sgs:
            return
        layers = list(self._model.sgs.values())
        self.least = tuple(layer.min_bins for layer in layers)
        self.depths = tuple(next(depth for depth, level in enumerate(self._model.levels) if layer in level) for layer in layers)
        with torch.no_grad():
            self._features = self._model.run_stem(clip)
            _, done = self._model.run_trunk(*self._features, forced=list(self.least))
        self.frames = tuple(sampled.segments.frames for sampled in done)
        self.most = tuple(min(layer.options.num_bins or frames, frames) for layer, frames in zip(layers, self.frames))
        self._stem = gflops(_Stem(self._model), clip)

    def at(self, bins: tuple[int, ...]) -> float:
        """Return the GFLOPs of a clip that keeps `bins` features, one number a layer: stem, sampling and trunk."""
        if not self.frames:
            return self.dense
        if bins not in self._by_bins:
            self._by_bins[bins] = gflops(_Trunk(self._model, bins), self._features)
        return self._stem + self._by_bins[bins]

    def estimate(self, bins: Sequence[tuple[int, ...]]) -> np.ndarray:
        """Return GFLOPs for each B' like `at`, from a few analyses for all of them together.

        The cost is linear in the lengths that features have along the trunk, which B' determines. Where one more analysis shows
        that it is not (a module with a `packed_forward` that changes lengths, many non-local blocks), each B' is analysed. With a
        layer behind another the estimate is a percent off.
        """
        if not self._model.times:  # bucketed, with one layer: the lengths are not known
            steps = np.linspace(self.least[0], self.frames[0], 5).round().astype(int)
            return np.interp([kept for (kept,) in bins], steps, [self.at((kept,)) for kept in steps.tolist()])
        names = [layer.name for layer in self._model.sgs.values()]
        times = {part for time in self._model.times.values() for part in time.by_layer()}
        layers = [(names.index(time.source), time) for time in times]
        terms = sorted({(layer, time.lengths(range(1, self.frames[layer] + 1))) for layer, time in layers})  # (layer, lengths by B' - 1)

        def row(kept: tuple[int, ...]) -> list[float]:
            return [1.0, *(lengths[kept[layer] - 1] for layer, lengths in terms)]

        known: list[tuple[int, ...]] = []  # not what was analysed before: it may lie where a cost that is not linear seems to be
        for layer, (least, frames, depth) in enumerate(zip(self.least, self.frames, self.depths)):
            others = [f if d < depth else low for f, low, d in zip(self.frames, self.least, self.depths)]
            for kept in (frames, *range(least, frames)):  # as many as determine the terms
                example = (*others[:layer], kept, *others[layer + 1 :])
                rows = np.array([row(other) for other in (*known, example)])
                if np.linalg.matrix_rank(rows) > (np.linalg.matrix_rank(rows[:-1]) if known else 0):
                    known.append(example)
        factors, *_ = np.linalg.lstsq(np.array([row(kept) for kept in known]), np.array([self.at(kept) for kept in known]), rcond=None)
        halves = tuple(max(least, frames // 2) for least, frames in zip(self.least, self.frames))
        if not any(self.depths) and abs(np.array(row(halves)) @ factors / self.at(halves) - 1) > LINEAR:
            return np.array([self.at(kept) for kept in bins])
        return np.array([row(kept) for kept in bins]) @ factors


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
        return self.model.run_stem(clips)


class _Trunk(nn.Module):
    """Sampling and trunk of a clip that is made to keep the given numbers of features."""

    def __init__(self, model: VideoNet, bins: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.forced = model, [(b,) for b in bins]

    def forward(self, *features: Tensor) -> tuple[Tensor, ...]:
        logits, sampled = self.model.run_trunk(*features, forced=self.forced)
        # What a layer would have done is returned, too: tracing drops what leads to nothing.
        return logits, *(done.proposal.weights for done in sampled)
