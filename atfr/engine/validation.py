"""The result of a validation during training: metrics, and what TensorBoard shows of the clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from atfr.engine.evaluator import Evaluation
from atfr.models.flops import GflopsTable

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ClipResults:
    """What a network found for each of N clips.

    Attributes:
        labels, predictions: [N] class numbers.
        bins: {name of an SGS layer: [N] B'}; empty for a dense network.
        frames: T at each of these layers.
        gflops: [N] GFLOPs of each clip.
        dense_gflops: of a clip in the network without SGS; None for a dense network, which needs no table of them.
        class_names: of the class numbers.
    """

    labels: np.ndarray
    predictions: np.ndarray
    bins: Mapping[str, np.ndarray]
    frames: tuple[int, ...]
    gflops: np.ndarray
    dense_gflops: float | None
    class_names: tuple[str, ...]

    def confusion(self) -> np.ndarray:
        """Return [classes, classes]: the number of clips of each class (row) with each prediction (column)."""
        classes = len(self.class_names)
        return np.bincount(self.labels * classes + self.predictions, minlength=classes * classes).reshape(classes, classes)

    def by_bins(self, layer: str) -> tuple[np.ndarray, np.ndarray]:
        """Return two counts of clips [T + 1] by their B' at a layer: those with the right prediction, and all."""
        kept, most = self.bins[layer], self.frames[list(self.bins).index(layer)]
        return np.bincount(kept[self.labels == self.predictions], minlength=most + 1), np.bincount(kept, minlength=most + 1)


def clip_results(evaluation: Evaluation, *, layers: Sequence[str], class_names: Sequence[str], table: GflopsTable | None) -> ClipResults:
    """Collect the results of the clips of an evaluation.

    Args:
        layers: names of the SGS layers; none for a dense network.
        table: GFLOPs by B'; None for a dense network.
    """
    views = evaluation.views
    bins = [view.bins for view in views]
    return ClipResults(
        labels=np.array([view.label for view in views], dtype=np.int64),
        predictions=np.array([view.scores.argmax() for view in views], dtype=np.int64),
        bins={name: np.array(kept, dtype=np.int64) for name, kept in zip(layers, zip(*bins))},
        frames=evaluation.frames[: len(layers)],
        gflops=np.empty(0) if table is None else table.estimate(bins),
        dense_gflops=None if table is None else table.dense,
        class_names=tuple(class_names),
    )


@dataclass(frozen=True)
class Validation:
    """The result of a validation.

    Attributes:
        metrics: of the whole split. The checkpoint with the highest `top1` is the best.
        clips: what is drawn of the clips; None: nothing.
        merges: pictures of what is merged in a few clips, the same clips in each validation.
    """

    metrics: Mapping[str, float]
    clips: ClipResults | None = None
    merges: tuple[Image, ...] = ()
