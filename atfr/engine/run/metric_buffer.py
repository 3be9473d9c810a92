"""Measurements of the training steps since the last log line."""

from __future__ import annotations

import math
import time
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
    """Collects the measurements of steps. Losses, norms and accuracies stay on the device until they are needed."""

    def __init__(self) -> None:
        self.measured: dict[str, list[Tensor]] = {}  # scalars, one a step
        self.paths: list[Sequence[str]] = []
        self.sums: dict[str, float] = {}
        self._began = 0.0
        self._on_host: dict[str, list[float]] | None = None

    def add(
        self, loss: Tensor, norm: Tensor, paths: Sequence[str], *,
        accuracy: Tensor | None = None, glance_loss: Tensor | None = None, data_s: float, step_s: float, **values: float,
    ) -> None:  # fmt: skip
        """Add a step that ends now.

        Args:
            norm: of the gradient.
            paths: files of the clips.
            accuracy: [2] top-1 and top-5 of this rank in percent; None for all steps or for none.
            glance_loss: what trained embedding=glance; None for all steps or for none.
            data_s, step_s: seconds that the step waited for its clips, and took after that.
        """
        if not self.paths:
            self._began = time.perf_counter() - step_s - data_s
        measured = {"loss": loss, "grad_norm": norm}
        if accuracy is not None:
            measured["top1"], measured["top5"] = accuracy
        if glance_loss is not None:
            measured["glance_loss"] = glance_loss
        for name, scalar in measured.items():
            self.measured.setdefault(name, []).append(scalar)
        self.paths.append(paths)
        self._on_host = None
        for name, value in {**values, "data_s": data_s, "step_s": step_s}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def on_host(self) -> dict[str, list[float]]:
        """Copy what was measured, by name with one value a step, to the host, which waits for the device."""
        if self._on_host is None:
            rows = torch.stack([torch.stack(scalars) for scalars in self.measured.values()]).tolist()
            self._on_host = dict(zip(self.measured, rows))
        return self._on_host

    def check(self, step: int, *, scaled: bool) -> None:
        """Raise FloatingPointError if the loss or gradient of a step is not finite.

        Args:
            step: number of the last step in the buffer.
            scaled: gradients have fp16 loss scaling, which handles those that are not finite.
        """
        if not self.paths:
            return
        losses, norms = (self.on_host()[name] for name in ("loss", "grad_norm"))
        first = step - len(losses) + 1
        for number, (loss, norm, paths) in enumerate(zip(losses, norms, self.paths), start=first):
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {number}; {REMEDY} (clips: {shortened(paths)})")
            if not math.isfinite(norm) and not scaled:
                raise FloatingPointError(f"the gradient's norm is {norm} at step {number}; {REMEDY} (clips of this rank: {shortened(paths)})")

    def means(self, dist_info: DistInfo) -> dict[str, float]:
        """Average over the steps and all ranks.

        `replaced` is a sum, the number of replaced videos. `steps_per_second` is measured from the start of the first step to now.
        """
        measured = self.on_host()
        steps, seconds = len(self.paths), time.perf_counter() - self._began
        totals = [*map(math.fsum, measured.values()), *self.sums.values()]
        if dist_info.world > 1:
            totals = comm.summed(torch.tensor(totals, dtype=torch.float64, device=dist_info.device)).tolist()
        means = dict(zip((*measured, *self.sums), (total / steps / dist_info.world for total in totals)))
        means["replaced"] *= steps * dist_info.world
        return {**means, "steps_per_second": steps / seconds}
