"""Mixup and CutMix: clips of a batch blended in pairs, with targets blended alike."""

from __future__ import annotations

from typing import Callable

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

Mix = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def mixing(*, mixup: float | None, cutmix: float | None, num_classes: int, seed: int) -> Mix | None:
    """A function from (clips [N, C, T, H, W], labels int64 [N], step) to (clips, targets [N, classes]); None if both are off.

    `mixup` and `cutmix` are the alphas of their Beta distributions; with both, each step takes one of them at random.
    All clips of a process have the same share of their partner, the clip before them in the batch, and all frames of a
    clip the same rectangle. What is drawn depends on (seed, step) alone; torch's global generator is left as it was.
    """
    chosen = [make(alpha=float(alpha), num_classes=num_classes) for make, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha is not None]
    if not chosen:
        return None
    either = v2.RandomChoice(chosen)

    def mix(clips: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.default_rng((seed, step)).integers(2**63)))
            # Called a video for its five dimensions; torchvision looks at the first and the last two only.
            mixed, targets = either(tv_tensors.Video(clips), labels)
        return mixed.as_subclass(Tensor), targets

    return mix
