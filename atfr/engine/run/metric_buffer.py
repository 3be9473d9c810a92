"""Measurements of the training steps since the last log line."""

from __future__ import annotations

import math
from typing import Sequence

import torch
from torch import Tensor

from atfr.engine.distributed import comm
from atfr.engine.distributed.comm import DistInfo

REMEDY = "saved checkpoints are intact; lower optimizer.lr or trainer.clip_norm, and set another trainer.output_dir"


def shortened(paths: Sequence[str]) -> str:
    """Join the first four paths for a message."""
    return ", ".join(paths[:4]) + (", ..." if len(paths) > 4 else "")


class MetricBuffer:
    """Collects the measurements of steps. Losses and norms stay on the device until they are needed."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.paths: list[Sequence[str]] = []
        self.sums: dict[str, float] = {}
        self._on_host: tuple[list[float], list[float]] | None = None

    def add(self, loss: Tensor, norm: Tensor, paths: Sequence[str], **values: float) -> None:
        """Add a step: its loss, the norm of its gradient, the files of its clips, and further values."""
        self.losses.append(loss)
        self.norms.append(norm)
        self.paths.append(paths)
        self._on_host = None
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def losses_and_norms(self) -> tuple[list[float], list[float]]:
        """Copy losses and norms to the host, which waits for the device."""
        if self._on_host is None:
            values, count = torch.stack([*self.losses, *self.norms]).tolist(), len(self.losses)
            self._on_host = values[:count], values[count:]
        return self._on_host

    def check(self, step: int, *, scaled: bool) -> None:
        """Raise FloatingPointError if the loss or gradient of a step is not finite.

        Args:
            step: number of the last step in the buffer.
            scaled: gradients have fp16 loss scaling, which handles those that are not finite.
        """
        if not self.losses:
            return
        losses, norms = self.losses_and_norms()
        first = step - len(losses) + 1
        for number, (loss, norm, paths) in enumerate(zip(losses, norms, self.paths), start=first):
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {number}; {REMEDY} (clips: {shortened(paths)})")
            if not math.isfinite(norm) and not scaled:
                raise FloatingPointError(f"the gradient's norm is {norm} at step {number}; {REMEDY} (clips of this rank: {shortened(paths)})")

    def means(self, dist_info: DistInfo) -> dict[str, float]:
        """Average over the steps and all ranks; `replaced` is a sum, the number of replaced videos."""
        losses, norms = self.losses_and_norms()
        totals = [math.fsum(losses), math.fsum(norms), *self.sums.values()]
        if dist_info.world > 1:
            totals = comm.summed(torch.tensor(totals, dtype=torch.float64, device=dist_info.device)).tolist()
        means = dict(zip(("loss", "grad_norm", *self.sums), (total / len(losses) / dist_info.world for total in totals)))
        means["replaced"] *= len(losses) * dist_info.world
        return means
