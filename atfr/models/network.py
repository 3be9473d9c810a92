"""A video network with or without SGS, behind one interface."""

from __future__ import annotations

from typing import Mapping, NamedTuple

import torch
from torch import Tensor, nn

from atfr.models.packed import Segments
from atfr.models.sgs_layer import SGS, SGSOptions, aggregate
from atfr.models.split import split_network


class Prediction(NamedTuple):
    """logits [N, classes], and how many temporal features of how many each clip kept."""

    logits: Tensor
    bins: tuple[int, ...]  # B' of each clip; T where nothing is sampled
    frames: int  # T at the place of sampling


class VideoNet(nn.Module):
    """`backbone` on clips [N, 3, T, H, W], sampled by SGS after one of its stages.

    Args:
        backbone: maps clips to logits [N, classes]; its head must pool over whatever it is given.
        stages: for each name that `sgs.after` may have, the path of the module in the backbone.
        sgs: None for the dense network, which then is the backbone and nothing else.

    Raises:
        ValueError: `sgs.after` is not a stage, or the rest of the backbone cannot be run packed.
    """

    def __init__(self, backbone: nn.Module, *, stages: Mapping[str, str], sgs: SGSOptions | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.sgs: SGS | None = None
        if sgs is None:
            return
        if sgs.after not in stages:
            raise ValueError(f"model.sgs.after={sgs.after!r} is not a stage of this network; choose one of {', '.join(stages)}")
        stem, trunk = split_network(backbone, after=stages[sgs.after], before_activation=sgs.before_activation)
        # Kept out of the module tree: both halves call the backbone's own modules, and registering
        # them would list every parameter a second time.
        self._halves = (stem, trunk)
        self.sgs = SGS(_output_channels(backbone, stem), sgs)

    def forward(self, clips: Tensor) -> Prediction:
        if self.sgs is None:
            return Prediction(self.backbone(clips), (clips.shape[2],) * len(clips), clips.shape[2])
        features = self.stem(clips)
        weights, lengths = self.sgs(features)
        logits = self.trunk(aggregate(features, weights, lengths), Segments(lengths, features.device))
        return Prediction(logits, lengths, features.shape[2])

    def stem(self, clips: Tensor) -> Tensor:
        """The features that SGS sees: [N, 3, T, H, W] -> [N, C, T', H', W']."""
        return self._halves[0](clips)

    def trunk(self, x: Tensor, segments: Segments) -> Tensor:
        """What follows SGS, on packed features [1, C, M, H', W']: logits [N, classes]."""
        return self._halves[1](x, segments)


def _output_channels(backbone: nn.Module, stem: nn.Module) -> int:
    training = {module: module.training for module in backbone.modules()}
    backbone.eval()  # so that the probe leaves the running statistics alone
    with torch.no_grad():
        channels = stem(torch.zeros(1, 3, 8, 64, 64)).shape[1]
    for module, mode in training.items():
        module.training = mode
    return channels
