"""Mixup and CutMix: blend pairs of clips in a batch, and their targets in the same ratio."""

from __future__ import annotations

from typing import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torchvision import tv_tensors
from torchvision.transforms import v2

Mix = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def mixing(*, mixup: float | None, cutmix: float | None, num_classes: int, seed: int) -> Mix | None:
    """Build the function (clips [N, C, T, H, W], labels int64 [N], step) -> (clips, targets [N, classes]); None if both are off.

    `mixup` and `cutmix` are the alphas of the Beta distributions. With both, each step uses one of them at random.
    The partner of clip i is clip i + N/2. The ratio and the rectangle depend only on (seed, step) and hold for all clips
    of a step. Rank r reads every world-th clip of the global batch, so pairs are the same for any number of ranks.
    Torch's generators are not changed.

    The function raises ValueError for an odd N.
    """
    chosen = [make(alpha=float(alpha), num_classes=2) for make, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha is not None]
    if not chosen:
        return None
    either = v2.RandomChoice(chosen)

    def mix(clips: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        if len(clips) % 2:
            raise ValueError(
                f"trainer.mixup and trainer.cutmix pair the clips of a rank, and {len(clips)} is odd: choose a trainer.batch_size that gives each rank an even number"
            )
        # torchvision mixes a batch of two: the two halves. It uses only the first and the last two dimensions, and
        # accepts more of them in a Video.
        halves = tv_tensors.Video(clips.reshape(2, -1, *clips.shape[2:]))  # [2, N/2 x C, T, H, W]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(np.random.default_rng((seed, step)).integers(2**63)))
            mixed, ratios = either(halves, torch.tensor([0, 1]))
        targets = one_hot(labels, num_classes).to(ratios.dtype)
        ratio = float(ratios[0, 0])  # weight of the clip; its partner has 1 - ratio
        return mixed.as_subclass(Tensor).reshape(clips.shape), ratio * targets + (1 - ratio) * targets.roll(len(labels) // 2, 0)

    return mix
