"""Networks, clips and a training step, for comparing two ways of computing it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from outcomes import run
from torch import Tensor, nn
from torchvision.models import video

from atfr.models.backbones.slowfast import slowfast
from atfr.models.backbones.x3d import x3d
from atfr.models.sgs.config import SGSConfig
from atfr.models.video_net import VideoNet

ATFR = SGSConfig.from_preset("atfr", width=0.6)


def of_x3d(sgs: SGSConfig | None) -> Callable[[], VideoNet]:
    return lambda: x3d(size="tiny", num_classes=5, sgs=sgs)


def of_r3d(sgs: SGSConfig | None) -> Callable[[], VideoNet]:
    """Torchvision's, which adds in place and has ReLUs in place."""
    return lambda: VideoNet(video.r3d_18(num_classes=5), stages={}, sgs=sgs)


NETWORKS = {
    "x3d": of_x3d(None),
    "x3d atfr": of_x3d(ATFR),
    "x3d reference": of_x3d(SGSConfig.from_preset("reference")),
    "x3d two levels": of_x3d(replace(ATFR, after=("stem", "res3"))),
    "x3d atfr that embeds features": of_x3d(replace(ATFR, embed_from="features")),
    "r3d": of_r3d(None),
    "r3d reference": of_r3d(SGSConfig.from_preset("reference", after="layer1")),
    "slowfast atfr": lambda: slowfast(size="8x8-R50", num_classes=5, sgs=replace(ATFR, after="res2")),
}


def clips(n: int = 4, frames: int = 16) -> Tensor:
    """Of different amounts of change, so that they keep different numbers of features."""
    x = torch.randn(n, 3, frames, 32, 32, generator=torch.Generator().manual_seed(1)).cumsum(dim=2)
    return x * torch.linspace(0.05, 1, n)[:, None, None, None, None]


def step(model: VideoNet, x: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], list[tuple[int, ...]]]:
    """Logits, gradients, buffers and B' of a training step."""
    torch.manual_seed(3)  # of dropout
    model.train().zero_grad()
    prediction = run(model, x)
    nn.functional.cross_entropy(prediction.logits, torch.arange(len(x)) % 5).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return prediction.logits.detach(), gradients, dict(model.named_buffers()), prediction.bins
