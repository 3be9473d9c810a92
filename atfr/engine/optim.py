"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Callable

import torch
from torch import Tensor, nn

Schedule = Callable[[int, int], float]  # (step, total steps) -> factor for the base learning rate


def sgd(
    model: nn.Module, *, lr: float, momentum: float, weight_decay: float, nesterov: bool, head_lr: float | None = None
) -> torch.optim.Optimizer:
    """Build SGD with the parameter `groups` of a model."""
    _require("optimizer.momentum", momentum, 0 <= momentum < 1, "at least 0 and below 1")
    _require("optimizer.momentum", momentum, momentum > 0 or not nesterov, "above 0 with optimizer.nesterov=true")
    parameters = groups(model, lr=lr, weight_decay=weight_decay, head_lr=head_lr)
    fused = _on_gpu(model)
    optimizer = torch.optim.SGD(parameters, momentum=momentum, nesterov=nesterov, fused=fused)
    if momentum and fused:
        start_from_zero(optimizer)
    return optimizer


def start_from_zero(optimizer: torch.optim.SGD) -> None:
    """Set the momentum of each parameter to zero, which makes the first step what it is without.

    A fused first step allocates it and, where the gradients of float16 overflow, writes nothing into it.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def adamw(
    model: nn.Module, *, lr: float, betas: Sequence[float], weight_decay: float, head_lr: float | None = None
) -> torch.optim.Optimizer:
    """Build AdamW (Loshchilov & Hutter, ICLR 2019) with the parameter `groups` of a model."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"optimizer.betas must be two numbers, at least 0 and below 1, not {list(betas)}")
    parameters = groups(model, lr=lr, weight_decay=weight_decay, head_lr=head_lr)
    return torch.optim.AdamW(parameters, betas=tuple(betas), fused=_on_gpu(model))


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state of `optimizer.state_dict()` from any device. Whether the step is fused stays as it is."""
    saved = [{**group, "fused": own.get("fused")} for group, own in zip(state["param_groups"], optimizer.param_groups)]
    optimizer.load_state_dict({**state, "param_groups": saved + state["param_groups"][len(saved) :]})


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return `lr`, that of the first group, and `lr_group_N` of each group N with another `base_lr` than the groups before it."""
    found: dict[float, int] = {}
    for number, group in enumerate(optimizer.param_groups):
        found.setdefault(group.get("base_lr", group["lr"]), number)
    return {f"lr_group_{number}" if number else "lr": optimizer.param_groups[number]["lr"] for number in found.values()}


def _on_gpu(model: nn.Module) -> bool | None:
    """Return whether a step of these parameters can be one launch; None leaves the choice to torch."""
    return all(p.is_cuda and p.is_floating_point() for p in model.parameters()) or None


def groups(model: nn.Module, *, lr: float, weight_decay: float, head_lr: float | None = None) -> list[dict[str, Any]]:
    """Build parameter groups without weight decay for biases and norms (every parameter with one dimension).

    Args:
        head_lr: factor for the learning rate of the classification layer, the last module of the network whose weight is a
            matrix. It is new where the other weights are pretrained. None: no groups of its own.

    Raises:
        ValueError: a value is negative or not finite, or `head_lr` is set and the model has no such layer.
    """
    _require("optimizer.lr", lr, lr >= 0, "at least 0")
    _require("optimizer.weight_decay", weight_decay, weight_decay >= 0, "at least 0")
    head: set[nn.Parameter] = set()
    if head_lr is not None:
        _require("optimizer.head_lr", head_lr, head_lr >= 0, "at least 0, or null")
        layers = [m for m in getattr(model, "dense_network", model).modules() if getattr(m, "weight", None) is not None and m.weight.dim() > 1]
        if not layers:
            raise ValueError("optimizer.head_lr is set, but the network has no classification layer; set it to null")
        head = set(layers[-1].parameters())
    found = []
    head_factor = 1.0 if head_lr is None else head_lr
    for factor, members in ((1.0, [p for p in model.parameters() if p not in head]), (head_factor, [p for p in model.parameters() if p in head])):
        if members:
            decayed = [p for p in members if p.requires_grad and p.dim() > 1]
            others = [p for p in members if p.requires_grad and p.dim() <= 1]
            found += [{"params": params, "lr": lr * factor, "weight_decay": decay} for params, decay in ((decayed, weight_decay), (others, 0.0))]
    return found


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float | None) -> Tensor:
    """Scale the gradients down to norm `limit` if their norm is larger. Return the norm before, a scalar on their device."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    # On a GPU the comparison would make the host wait, so the gradients are always multiplied there.
    if limit is not None and (norm.device.type != "cpu" or norm > limit):
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def cosine(*, warmup: float, start_factor: float, end_factor: float, from_start: bool = False) -> Schedule:
    """Build a half-cosine schedule with linear warm-up (SGDR, Loshchilov & Hutter, ICLR 2017, without restarts).

    Args:
        warmup: fraction of all steps in which the factor rises linearly from `start_factor` to 1.
        end_factor: at the last step.
        from_start: the cosine begins at the first step, and the warm-up ends on the curve, below 1, as in SlowFast
            (Feichtenhofer et al., ICCV 2019, and SOLVER.LR_POLICY of PySlowFast).
    """
    _check_warmup(warmup, start_factor)
    _require("schedule.end_factor", end_factor, end_factor >= 0, "at least 0")

    def factor(step: int, total_steps: int) -> float:
        began = 0.0 if from_start else warmup * total_steps

        def falling(at: float) -> float:
            done = (at - began) / max(total_steps - began, 1)
            return end_factor + (1 - end_factor) * (1 + math.cos(math.pi * min(done, 1.0))) / 2

        rising = _warmup_factor(step, total_steps, warmup=warmup, start_factor=start_factor, to=falling(warmup * total_steps))
        return falling(step) if rising is None else rising

    return factor


def multistep(*, warmup: float, start_factor: float, milestones: Sequence[float], gamma: float) -> Schedule:
    """Build a schedule that multiplies the rate by `gamma` at each milestone.

    Args:
        warmup: fraction of all steps in which the factor rises linearly from `start_factor` to 1.
        milestones: fractions of all steps.
    """
    _check_warmup(warmup, start_factor)
    _require("schedule.gamma", gamma, 0 < gamma <= 1, "above 0 and at most 1")
    if not all(0 < milestone < 1 for milestone in milestones):
        raise ValueError(f"schedule.milestones are fractions of all steps, above 0 and below 1, not {list(milestones)}")

    def factor(step: int, total_steps: int) -> float:
        rising = _warmup_factor(step, total_steps, warmup=warmup, start_factor=start_factor)
        # Rounded, because in floating point 0.3 of 10 steps may be just above 3.
        return gamma ** sum(step >= round(milestone * total_steps) for milestone in milestones) if rising is None else rising

    return factor


def step(*, warmup: float, start_factor: float, every: float, gamma: float) -> Schedule:
    """Build a `multistep` schedule with a milestone after each fraction `every` of all steps."""
    if not 0 < every <= 1:
        raise ValueError(f"schedule.every is a fraction of all steps, above 0 and at most 1, not {every}")
    milestones = [every * number for number in range(1, math.ceil(1 / every)) if every * number < 1]
    return multistep(warmup=warmup, start_factor=start_factor, milestones=milestones, gamma=gamma)


def _check_warmup(warmup: float, start_factor: float) -> None:
    if not 0 <= warmup < 1:
        raise ValueError(f"schedule.warmup is a fraction of all steps, at least 0 and below 1, not {warmup}")
    _require("schedule.start_factor", start_factor, start_factor >= 0, "at least 0")


def _warmup_factor(step: int, total_steps: int, *, warmup: float, start_factor: float, to: float = 1.0) -> float | None:
    """Return the factor during warm-up, on a line from `start_factor` to `to`; None afterwards."""
    warmup_steps = warmup * total_steps
    return start_factor + (to - start_factor) * step / warmup_steps if step < warmup_steps else None


def _require(option: str, value: float, holds: bool, what: str) -> None:
    if not (holds and math.isfinite(value)):
        raise ValueError(f"{option} must be {what}, not {value}")
