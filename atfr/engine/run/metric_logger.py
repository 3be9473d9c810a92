"""What a run writes down as it goes: `metrics.jsonl` and TensorBoard scalars, in step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Mapping

from torch.utils.tensorboard import SummaryWriter

from atfr.utils.atomic_io import write_text


class RunLog:
    """Appends one JSON object a line to `metrics.jsonl` and the same values to TensorBoard.

    Opened at the step a run resumes from, it drops what an interrupted run had logged after it (and
    a validation after `evaluated`, which will be done again), so that no step appears twice.
    """

    def __init__(self, folder: Path, *, resume_step: int, evaluated: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.metrics = folder / "metrics.jsonl"
        kept = self._keep_until(train=resume_step, val=evaluated)
        self._file = open(self.metrics, "ab", buffering=0)  # unbuffered: what cannot be written is not tried again
        self.tensorboard = folder / "tensorboard"
        # TensorBoard can only drop whole steps, of all splits: from the first that lost something, and what stays is written again.
        first = min(resume_step, evaluated) + 1
        self._writer = SummaryWriter(str(self.tensorboard), purge_step=first)
        for entry in kept:
            if entry["step"] >= first:
                self._draw(entry.pop("step"), entry.pop("split"), {name: value for name, value in entry.items() if name != "epoch"})

    def write(self, *, step: int, epoch: int, split: str, values: Mapping[str, float]) -> None:
        """Log values measured after `step` optimizer steps, in (0-based) `epoch`."""
        # JSON has no infinity, which a gradient norm may be under fp16 loss scaling.
        plain = {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            self._file.write(json.dumps({"step": step, "epoch": epoch, "split": split, **plain}).encode() + b"\n")
        except OSError as error:
            reason = f"{self.metrics} could not be written ({error.strerror}); make room and run the same command again"
            raise OSError(reason) from error
        self._draw(step, split, values)

    def close(self) -> None:
        self._file.close()
        self._writer.close()

    def _draw(self, step: int, split: str, values: Mapping[str, float | None]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{split}/{name}", math.nan if value is None else value, step)

    def _keep_until(self, **last: int) -> list[dict[str, Any]]:
        """Drop the entries of each split after its last step; those that stay."""
        if not self.metrics.exists():
            return []
        kept, entries = [], []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
                if entry["step"] <= last[entry["split"]]:
                    kept.append(line + "\n")
                    entries.append(entry)
            except (json.JSONDecodeError, KeyError):
                continue  # the last line of a killed run
        write_text(self.metrics, "".join(kept))
        return entries
