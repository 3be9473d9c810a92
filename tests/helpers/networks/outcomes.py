"""What a network returns for a batch, as one record."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from atfr.models.sgs.sampling import Forced, Sampled
from atfr.models.video_net import VideoNet


class Outcome(NamedTuple):
    logits: Tensor  # [N, classes]
    layers: tuple[Sampled, ...]
    bins: list[tuple[int, ...]]  # B' of each clip, one number a layer
    frames: tuple[int, ...]


def run(model: VideoNet, clips: Tensor, forced: Forced | None = None) -> Outcome:
    logits, sampling = model(clips, forced, return_sampling=True)
    return Outcome(logits, sampling.layers, sampling.bins, sampling.frames)
