"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math

import torch
from torch import nn


def sgd(
    model: nn.Module, *, lr: float, momentum: float, weight_decay: float, nesterov: bool
) -> torch.optim.Optimizer:
    """SGD whose weight decay spares biases and norms (every parameter with one dimension)."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    spared = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov)


def cosine(step: int, total_steps: int, *, warmup: float, start_factor: float, end_factor: float) -> float:
    """What to multiply the base learning rate with at `step` of `total_steps`.

    A line from `start_factor` to 1 over the first `warmup` (share of all steps), then half a
    cosine down to `end_factor` (SGDR, Loshchilov & Hutter, ICLR 2017, without restarts).
    """
    if not 0 <= warmup < 1:
        raise ValueError(f"schedule.warmup is a share of all steps, at least 0 and below 1, not {warmup}")
    warmup_steps = warmup * total_steps
    if step < warmup_steps:
        return start_factor + (1 - start_factor) * step / warmup_steps
    done = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return end_factor + (1 - end_factor) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
