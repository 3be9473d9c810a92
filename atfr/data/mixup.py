"""Mixup and CutMix: clips of a batch blended in pairs, with targets blended alike."""

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
    """A function from (clips [N, C, T, H, W], labels int64 [N], step) to (clips, targets [N, classes]); None if both are off.

    `mixup` and `cutmix` are the alphas of their Beta distributions; with both, each step takes one of them at random.
    A clip's partner is the one half a batch away. Process r of w has every w-th clip of the global batch, so half its own
    batch away is half the global one: the pairs, as the share and the rectangle, which are one for all clips of a step
    and depend on (seed, step) alone, are the same for any number of processes. Torch's generators are left as they were.

    The function raises ValueError for an odd N, which has no halves.
    """
    chosen = [make(alpha=float(alpha), num_classes=2) for make, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha is not None]
    if not chosen:
        return None
    either = v2.RandomChoice(chosen)

    def mix(clips: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        if len(clips) % 2:
            raise ValueError(
                f"trainer.mixup and trainer.cutmix pair the clips of a process, and {len(clips)} is odd: choose a trainer.batch_size that gives each an even number"
            )
        # The two halves are a batch of two, which torchvision mixes with each other. It looks at the first and the last
        # two dimensions only; called a video it may have as many as it likes.
        halves = tv_tensors.Video(clips.reshape(2, -1, *clips.shape[2:]))  # [2, N/2 x C, T, H, W]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(np.random.default_rng((seed, step)).integers(2**63)))
            mixed, shares = either(halves, torch.tensor([0, 1]))
        targets = one_hot(labels, num_classes).to(shares.dtype)
        share = float(shares[0, 0])  # of a clip itself, the rest is its partner's
        return mixed.as_subclass(Tensor).reshape(clips.shape), share * targets + (1 - share) * targets.roll(len(labels) // 2, 0)

    return mix
