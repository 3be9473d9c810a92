"""Load a trained network and classify videos with it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf

from atfr.cli import builders, from_checkpoint
from atfr.data.clips import ClipSettings, TestClips
from atfr.data.transforms import Normalizer
from atfr.data.types import Video, VideoError
from atfr.engine.distributed.comm import DistInfo
from atfr.models.video_net import VideoNet


@dataclass(frozen=True)
class Classification:
    """What a classifier says of one video, averaged over its views."""

    labels: tuple[str, ...]  # the most probable classes, best first
    probabilities: tuple[float, ...]
    bins: tuple[tuple[int, ...], ...]  # B' of each view, one number a layer
    gflops: float  # mean of a view
    dense_gflops: float  # of a view of the dense network

    def __str__(self) -> str:
        classes = ", ".join(f"{label} {100 * p:.1f} %" for label, p in zip(self.labels, self.probabilities))
        kept = " ".join("/".join(map(str, bins)) for bins in self.bins)
        return f"{classes}; B' {kept}; {self.gflops:.3g} of {self.dense_gflops:.3g} GFLOPs a view"


class Classifier:
    """A trained network with the clips it was trained for. Call it with the path of a video.

    Attributes:
        model: the network, in evaluation mode.
        clip: how frames are taken from a video.
        class_names: of the logits, in their order.
    """

    def __init__(self, model: VideoNet, clip: ClipSettings, class_names: tuple[str, ...]) -> None:
        self.model, self.clip, self.class_names = model.eval(), clip, class_names
        self._device = next(model.parameters()).device
        self._normalise = Normalizer(clip.mean, clip.std).to(self._device)

    @torch.inference_mode()
    def __call__(self, path: str | os.PathLike, *, top: int = 5) -> Classification:
        """Classify a video by the mean of its views' softmax scores.

        Args:
            top: how many classes to return.

        Raises:
            VideoError: the video cannot be read.
        """
        views = TestClips([Video(os.fspath(path), 0)], self.clip, views=self.clip.views, crops=self.clip.crops)
        scores, bins, gflops = [], [], []
        for view in (views[item] for item in range(len(views))):
            if view.clip is None:
                raise VideoError(os.fspath(path), view.error)
            logits, sampling = self.model(self._normalise(view.clip[None].to(self._device)), return_sampling=True)
            scores.append(logits[0].float().softmax(dim=0))
            bins += sampling.bins
            gflops += sampling.gflops.tolist()
        best = torch.stack(scores).mean(dim=0).topk(min(top, len(self.class_names)))
        return Classification(
            labels=tuple(self.class_names[i] for i in best.indices.tolist()),
            probabilities=tuple(best.values.tolist()),
            bins=tuple(bins),
            gflops=sum(gflops) / len(gflops),
            dense_gflops=builders.gflops_table(self.model, self.clip).dense,
        )


def load(path: str | os.PathLike, *, device: str | torch.device | None = None) -> Classifier:
    """Load the network of a run folder (its best checkpoint) or of a checkpoint file.

    Args:
        device: None: the first GPU if torch sees one, else the CPU.

    Raises:
        FileNotFoundError, ValueError: there is no such checkpoint, or it cannot be read.
    """
    file = from_checkpoint.checkpoint_file(os.fspath(path))
    state = from_checkpoint.read(Path(file))
    config = OmegaConf.create(state["config"])
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = from_checkpoint.trained_model(config, state, file, DistInfo(0, 1, device))
    return Classifier(model, builders.clip_settings(config), tuple(state["class_names"]))
