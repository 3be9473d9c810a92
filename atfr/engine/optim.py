"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def sgd(
    model: nn.Module, *, lr: float, momentum: float, weight_decay: float, nesterov: bool, head_lr: float | None = None
) -> torch.optim.Optimizer:
    """SGD with the `groups` of a model."""
    return torch.optim.SGD(groups(model, lr=lr, weight_decay=weight_decay, head_lr=head_lr), momentum=momentum, nesterov=nesterov)


def adamw(
    model: nn.Module, *, lr: float, betas: Sequence[float], weight_decay: float, head_lr: float | None = None
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter, ICLR 2019) with the `groups` of a model."""
    return torch.optim.AdamW(groups(model, lr=lr, weight_decay=weight_decay, head_lr=head_lr), betas=tuple(betas))


def groups(model: nn.Module, *, lr: float, weight_decay: float, head_lr: float | None = None) -> list[dict[str, Any]]:
    """Parameter groups whose weight decay spares biases and norms (every parameter with one dimension).

    With `head_lr` the classification layer, the backbone's last module with a matrix, is in groups of
    its own, with `head_lr` times the learning rate: what is new where the rest comes from pretrained
    weights.

    Raises:
        ValueError: `head_lr` is negative, or the model has no such layer.
    """
    head: set[nn.Parameter] = set()
    if head_lr is not None:
        if head_lr < 0:
            raise ValueError(f"optimizer.head_lr is {head_lr}, it must be at least 0, or null")
        layers = [m for m in getattr(model, "backbone", model).modules() if getattr(m, "weight", None) is not None and m.weight.dim() > 1]
        if not layers:
            raise ValueError("optimizer.head_lr is set, but the network has no classification layer; set it to null")
        head = set(layers[-1].parameters())
    found = []
    for factor, members in ((1.0, [p for p in model.parameters() if p not in head]), (head_lr, [p for p in model.parameters() if p in head])):
        if members:
            decayed = [p for p in members if p.requires_grad and p.dim() > 1]
            spared = [p for p in members if p.requires_grad and p.dim() <= 1]
            found += [{"params": some, "lr": lr * factor, "weight_decay": decay} for some, decay in ((decayed, weight_decay), (spared, 0.0))]
    return found


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float | None) -> Tensor:
    """Scale the gradients down to the norm `limit`, if theirs is larger; return the norm that they had."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    # On a GPU, the comparison would make the host wait, so that the gradients are multiplied in any case.
    if limit is not None and (norm.device.type != "cpu" or norm > limit):
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def cosine(step: int, total_steps: int, *, warmup: float, start_factor: float, end_factor: float, from_start: bool = False) -> float:
    """What to multiply the base learning rate with at `step` of `total_steps`.

    A line from `start_factor` to 1 over the first `warmup` (share of all steps), then half a
    cosine down to `end_factor` (SGDR, Loshchilov & Hutter, ICLR 2017, without restarts). With
    `from_start` the cosine falls from the first step on, and the line ends on it, below 1, as in
    SlowFast's training (Feichtenhofer et al., ICCV 2019, and PySlowFast's SOLVER.LR_POLICY).
    """
    began = 0.0 if from_start else warmup * total_steps

    def falling(at: float) -> float:
        done = (at - began) / max(total_steps - began, 1)
        return end_factor + (1 - end_factor) * (1 + math.cos(math.pi * min(done, 1.0))) / 2

    rising = _warming_up(step, total_steps, warmup=warmup, start_factor=start_factor, to=falling(warmup * total_steps))
    return falling(step) if rising is None else rising


def multistep(step: int, total_steps: int, *, warmup: float, start_factor: float, milestones: Sequence[float], gamma: float) -> float:
    """What to multiply the base learning rate with: `gamma` for each of the milestones (shares of all steps) that was reached.

    The first `warmup` (share of all steps) is a line from `start_factor` to 1.
    """
    if not all(0 < share < 1 for share in milestones):
        raise ValueError(f"schedule.milestones are shares of all steps, above 0 and below 1, not {list(milestones)}")
    rising = _warming_up(step, total_steps, warmup=warmup, start_factor=start_factor)
    # Rounded, so that 0.3 of 10 steps is the third and not, by a bit of float, the fourth.
    return gamma ** sum(step >= round(share * total_steps) for share in milestones) if rising is None else rising


def step(step: int, total_steps: int, *, warmup: float, start_factor: float, every: float, gamma: float) -> float:
    """The same with a milestone after each `every` (share of all steps)."""
    if not 0 < every <= 1:
        raise ValueError(f"schedule.every is a share of all steps, above 0 and at most 1, not {every}")
    milestones = [every * number for number in range(1, math.ceil(1 / every)) if every * number < 1]
    return multistep(step, total_steps, warmup=warmup, start_factor=start_factor, milestones=milestones, gamma=gamma)


def _warming_up(step: int, total_steps: int, *, warmup: float, start_factor: float, to: float = 1.0) -> float | None:
    """A line from `start_factor` to `to` over the first `warmup` (share of all steps); None after it."""
    if not 0 <= warmup < 1:
        raise ValueError(f"schedule.warmup is a share of all steps, at least 0 and below 1, not {warmup}")
    warmup_steps = warmup * total_steps
    return start_factor + (to - start_factor) * step / warmup_steps if step < warmup_steps else None
