"""An embedding that learns which change matters: `embedding=glance`.

A small network looks at each frame and gives z. While it trains, noise is added to z, and what is left must suffice to classify
the clip. Frames that differ in what matters for the class must differ by more than the noise; whatever else changes from
frame to frame is worth nothing, and the penalty on the length of z removes it. So distances between z measure what would be
lost if two frames were merged (a variational information bottleneck: Alemi et al., ICLR 2017).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from atfr.models.packed.ops import framewise_pool

WIDTHS = (16, 32, 64)  # channels of the convolutions over a frame
HIDDEN, KERNEL = 64, 5  # of the convolutions over time that classify
CELLS = 2  # per side, of what the convolutions over a frame give
SHORT = 1e-3  # factor of the mean squared length of z in the loss


class Glance(NamedTuple):
    """What a training step trains the embedding by."""

    logits: Tensor  # [N, classes]
    length: Tensor  # scalar, mean |z|^2 of the frames


class GlanceEmbedding(nn.Module):
    """z from a small network that is trained to classify clips by z and noise.

    Args:
        channels: of the frames or features.
        dim: D.
        grid: cells per side to which frames are averaged first.
        num_classes: of the clips.
    """

    def __init__(self, channels: int, dim: int, grid: int, num_classes: int) -> None:
        super().__init__()
        self.channels, self.grid = channels, grid
        layers: list[nn.Module] = []
        for before, after in zip((channels, *WIDTHS), WIDTHS):
            layers += [nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1), nn.GroupNorm(4, after), nn.ReLU()]
        self.look = nn.Sequential(*layers, Cells(), nn.Flatten(), nn.Linear(WIDTHS[-1] * CELLS**2, dim))
        self.classify = GlanceClassifier(dim, num_classes)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # forward passes of training so far

    def pool(self, x: Tensor) -> Tensor:
        """[N, C, T, H, W] -> [N, T, C g g], without a gradient: the sampled features are not trained for it."""
        return framewise_pool(x.detach(), self.grid)

    def forward(self, pooled: Tensor) -> Tensor:
        """[N, T, C g g] -> [N, T, D]."""
        frames = pooled.reshape(-1, self.channels, self.grid, self.grid).to(self.classify.out.weight.dtype)  # [N T, C, g, g]
        return self.look(frames).unflatten(0, (pooled.shape[0], pooled.shape[1]))

    def glance(self, z: Tensor, mask: Tensor) -> Glance:
        """Return what a training step trains z [N, T, D] by; mask [N, T]: the frames that exist."""
        self.steps += 1
        return Glance(self.classify(z, mask), (z.square().sum(dim=2) * mask).sum() / mask.sum())

    @property
    def learns(self) -> bool:
        return self.classify.out.weight.requires_grad


class Cells(nn.Module):
    """Averages maps [N, C, H, W] over CELLS x CELLS cells. A grid of 16 gives such maps, and torch's pool has no deterministic backward pass on GPUs."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[2:] == (CELLS, CELLS) else nn.functional.adaptive_avg_pool2d(x, CELLS)


class GlanceClassifier(nn.Module):
    """Classifies clips by their z and noise of variance 1: two convolutions over time, and their mean and maximum. Used in training only."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(dim, HIDDEN, KERNEL, padding="same")
        self.second = nn.Conv1d(HIDDEN, HIDDEN, KERNEL, padding="same", dilation=2)
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(2))  # over channels: padding beyond a clip's end is not seen
        self.out = nn.Linear(2 * HIDDEN, num_classes)

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        """Return logits [N, classes] of z [N, T, D], of which the frames in mask [N, T] exist."""
        exists = mask[:, None].to(z.dtype)  # [N, 1, T]
        x = (z + torch.randn_like(z)).transpose(1, 2) * exists  # [N, D, T]
        for convolution, norm in zip((self.first, self.second), self.norms):
            x = norm(convolution(x).transpose(1, 2)).relu().transpose(1, 2) * exists  # [N, HIDDEN, T]
        return self.out(torch.cat([x.sum(dim=2) / exists.sum(dim=2), x.amax(dim=2)], dim=1))
