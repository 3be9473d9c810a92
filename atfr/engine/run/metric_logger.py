"""The metrics of a run, in `metrics.jsonl` and as TensorBoard scalars."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, BinaryIO, Mapping

from torch.utils.tensorboard import SummaryWriter

from atfr.utils.atomic_io import write_text


class MetricLogger:
    """Appends one JSON object per line to `metrics.jsonl`, and writes the same values to TensorBoard."""

    def __init__(self, folder: Path) -> None:
        self.metrics, self.tensorboard = folder / "metrics.jsonl", folder / "tensorboard"
        self._file: BinaryIO | None = None
        self._writer: SummaryWriter | None = None

    def open(self, *, step: int, evaluated: int) -> None:
        """Open the files to continue after `step`. No step is in them twice.

        Training metrics after `step`, and validation metrics after `evaluated`, are from a run that was interrupted before it
        saved them. They are removed, because the run computes them again.
        """
        self.metrics.parent.mkdir(parents=True, exist_ok=True)
        kept = self._keep_until(train=step, val=evaluated)
        self._file = open(self.metrics, "ab", buffering=0)  # unbuffered: a line that could not be written is not tried again
        # TensorBoard can only remove all values from a step on. Those that stay are written again.
        first = min(step, evaluated) + 1
        self._writer = writer = SummaryWriter(str(self.tensorboard), purge_step=first)
        for entry in kept:
            if entry["step"] >= first:
                _add_scalars(writer, entry.pop("step"), entry.pop("split"), {name: value for name, value in entry.items() if name != "epoch"})

    def write(self, *, step: int, epoch: int, split: str, values: Mapping[str, float]) -> None:
        """Log values measured after `step` optimizer steps, in the (0-based) `epoch`. Does nothing before `open`."""
        if self._file is None or self._writer is None:
            return
        # JSON has no infinity, which a gradient norm may be under fp16 loss scaling.
        plain = {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            self._file.write(json.dumps({"step": step, "epoch": epoch, "split": split, **plain}).encode() + b"\n")
        except OSError as error:
            reason = f"{self.metrics} could not be written ({error.strerror}); make room and run the same command again"
            raise OSError(reason) from error
        _add_scalars(self._writer, step, split, values)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()

    def _keep_until(self, **last: int) -> list[dict[str, Any]]:
        """Remove the entries after the last step of each split; return the others."""
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
                continue  # the last line of a run that was killed
        write_text(self.metrics, "".join(kept))
        return entries


def _add_scalars(writer: SummaryWriter, step: int, split: str, values: Mapping[str, float | None]) -> None:
    for name, value in values.items():
        writer.add_scalar(f"{split}/{name}", math.nan if value is None else value, step)
