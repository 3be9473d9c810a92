"""Clips that keep different numbers of features, and networks whose logits show what leaks from one to another."""

from __future__ import annotations

import random

import torch
from batch_norms import spread
from torch import nn

TOLERANCE = 1e-4  # of logits of spread one


def lively(model: nn.Module, frames: int = 16, size: int = 32) -> nn.Module:
    """Batch norms away from the identity, so that padding would leak, and logits of spread one."""
    spread(model)
    last = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == 6][0]
    nn.init.normal_(last.weight)
    with torch.no_grad():
        logits = model(uneven_clips(4, frames, size))
        last.weight /= logits.std()
    return model


def uneven_clips(count: int, frames: int = 16, size: int = 32, least: int = 1) -> torch.Tensor:
    """Clips that change a different number of times each, if only by a little noise: `least` = 1."""
    clips = torch.randn(count, 3, frames, size, size)
    for clip in clips:
        changes = random.randint(least, frames)
        held = torch.arange(frames) * changes // frames
        clip.copy_(clip[:, held] + 0.02 * torch.randn(3, frames, size, size))
    return clips
