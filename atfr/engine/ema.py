"""Exponential moving average of weights."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator, Sequence

import torch
from torch import Tensor, nn


class Ema:
    """Averages a model's parameters over the steps (Polyak & Juditsky, 1992; exponential as in Tan & Le, 2019).

    Buffers are not averaged: the statistics of batch norm are measured for the averaged weights. In step n the decay is at most
    (1 + n) / (10 + n), so the initial weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.names, self.parameters = zip(*model.named_parameters())
        self.decay, self.steps = decay, 0
        self.averages = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Add the parameters to the average, after an optimizer step."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1 - decay)
        self.steps += 1

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Give the model the averaged weights in this block. Afterwards its own weights and buffers are restored."""
        own, buffers = [p.detach().clone() for p in self.parameters], [b.clone() for b in model.buffers()]
        try:
            _copy(self.averages, self.parameters)
            yield
        finally:
            _copy(own, self.parameters)
            _copy(buffers, list(model.buffers()))

    def state_dict(self) -> dict[str, object]:
        return {"averages": dict(zip(self.names, self.averages)), "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        _copy([state["averages"][name] for name in self.names], self.averages)
        self.steps = state["steps"]


@torch.no_grad()
def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)
