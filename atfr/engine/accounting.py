"""GFLOPs of each clip, by how many temporal features it kept.

Convention: fvcore's, one multiply-add is one FLOP; batch norm is not counted; the sampling layer
itself is. Costs are looked up in a table with one fvcore analysis per distinct B', since the cost
of a trunk with temporal strides is a staircase in B' that no formula gives. Of the sampling layer the
embedding and the aggregation are counted; comparing frames is elementwise work, which fvcore leaves out.
"""

from __future__ import annotations

import copy
import logging

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from atfr.models.network import VideoNet
from atfr.models.packed import Segments
from atfr.models.sgs import uniform_bins
from atfr.models.sgs_layer import aggregate

CONVENTION = "fvcore: one multiply-add = one FLOP, batch norm excluded, sampling layer included, one clip (view)"


class GflopsTable:
    """What a clip of `clip_shape` (3, T, H, W) costs `model`, dense and for each B' it may keep."""

    def __init__(self, model: VideoNet, clip_shape: tuple[int, int, int, int]) -> None:
        # fvcore traces in Python; a copy on the CPU leaves the model, its device and its mode alone.
        self._model = copy.deepcopy(model).cpu().eval()
        clip = torch.zeros(1, *clip_shape)
        self.dense = gflops(self._model.backbone, clip)
        self._by_bins: dict[tuple[int, ...], float] = {}
        self._features: Tensor | None = None
        if model.sgs is not None:
            with torch.no_grad():
                self._features = self._model.stem(clip)
            self._stem = gflops(_Stem(self._model), clip)
            self._row = self._features.numel() / 1e9  # one bin as a weighted sum of all frames

    @property
    def frames(self) -> int | None:
        """T where the sampling is done; None for a dense network."""
        return None if self._features is None else self._features.shape[2]

    def at(self, bins: int) -> float:
        """GFLOPs of a clip that keeps `bins` features: stem, sampling layer and trunk."""
        if self._features is None:
            return self.dense
        return self._stem + self._tail(bins)

    def executed(self, lengths: tuple[int, ...]) -> float:
        """GFLOPs that a packed batch of such clips runs.

        Beyond their sum these are the gaps between the clips, and the sampling layer summing as
        many bins for each clip as the longest one has.
        """
        total = sum(self.at(length) for length in lengths)
        if self._features is None:
            return total
        gap = self._tail(1, 1) - 2 * self._tail(1)
        return total + gap * (len(lengths) - 1) + self._row * (len(lengths) * max(lengths) - sum(lengths))

    def _tail(self, *lengths: int) -> float:
        if lengths not in self._by_bins:
            features = self._features.expand(len(lengths), *self._features.shape[1:])
            self._by_bins[lengths] = gflops(_Tail(self._model, lengths), features)
        return self._by_bins[lengths]


def gflops(module: nn.Module, example: Tensor) -> float:
    """GFLOPs of one forward of `module`, in the convention above."""
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    analysis = FlopCountAnalysis(module, example)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    # Not None, which fvcore documents but which leaves its own batch norm handle in place.
    analysis.set_op_handle("aten::batch_norm", lambda inputs, outputs: 0)
    return analysis.total() / 1e9


class _Stem(nn.Module):
    """Everything whose cost does not depend on B': the stem and the similarity embedding."""

    def __init__(self, model: VideoNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, clips: Tensor) -> Tensor:
        return self.model.sgs.embed(self.model.stem(clips))


class _Tail(nn.Module):
    """Aggregation and trunk of clips made to keep the given numbers of features."""

    def __init__(self, model: VideoNet, lengths: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.lengths = model, lengths

    def forward(self, features: Tensor) -> Tensor:
        weights = features.new_zeros(len(self.lengths), max(self.lengths), features.shape[2])
        for clip, length in enumerate(self.lengths):
            weights[clip, uniform_bins(features.shape[2], length), torch.arange(features.shape[2])] = 1
        packed = aggregate(features, weights, self.lengths)
        return self.model.trunk(packed, Segments(self.lengths, features.device))
