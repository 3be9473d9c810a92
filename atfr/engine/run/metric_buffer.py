"""What the steps since the last log line measured, left on the device until it is needed."""

from __future__ import annotations

import math
from typing import Sequence

import torch
from torch import Tensor

from atfr.engine.distributed import comm
from atfr.engine.distributed.comm import DistInfo

REMEDY = "what was saved before is intact; lower optimizer.lr or trainer.clip_norm, with another trainer.output_dir"


def some(paths: Sequence[str]) -> str:
    """The first of them, to be read."""
    return ", ".join(paths[:4]) + (", ..." if len(paths) > 4 else "")


class MetricBuffer:
    """Measurements of the steps since the last log line, left on the device until they are needed."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.paths: list[Sequence[str]] = []
        self.sums: dict[str, float] = {}
        self._fetched: tuple[list[float], list[float]] | None = None

    def add(self, loss: Tensor, norm: Tensor, paths: Sequence[str], **values: float) -> None:
        self.losses.append(loss)
        self.norms.append(norm)
        self.paths.append(paths)
        self._fetched = None
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def fetched(self) -> tuple[list[float], list[float]]:
        """Losses and norms on the host: the one wait for the device."""
        if self._fetched is None:
            values, count = torch.stack([*self.losses, *self.norms]).tolist(), len(self.losses)
            self._fetched = values[:count], values[count:]
        return self._fetched

    def check(self, step: int, *, scaled: bool = False) -> None:
        """Raise FloatingPointError if a loss or, unless fp16 scaling deals with it, a gradient is not finite."""
        if not self.losses:
            return
        losses, norms = self.fetched()
        first = step - len(losses) + 1
        for number, (loss, norm, paths) in enumerate(zip(losses, norms, self.paths), start=first):
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {number}; {REMEDY} (clips: {some(paths)})")
            if not math.isfinite(norm) and not scaled:
                raise FloatingPointError(f"the gradient's norm is {norm} at step {number}; {REMEDY} (clips of this process: {some(paths)})")

    def means(self, dist_info: DistInfo) -> dict[str, float]:
        """Means over the steps and all processes; `replaced` is the number of videos replaced in them."""
        losses, norms = self.fetched()
        totals = [math.fsum(losses), math.fsum(norms), *self.sums.values()]
        if dist_info.world > 1:
            totals = comm.summed(torch.tensor(totals, dtype=torch.float64, device=dist_info.device)).tolist()
        means = dict(zip(("loss", "grad_norm", *self.sums), (total / len(losses) / dist_info.world for total in totals)))
        means["replaced"] *= len(losses) * dist_info.world
        return means
