"""The metrics of a run, in `metrics.jsonl` and in TensorBoard."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, BinaryIO, Mapping

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from atfr.engine.run.validation_summaries import add_validation
from atfr.engine.validation import Validation
from atfr.utils.atomic_io import write_text
from atfr.utils.optional import or_warn

COMPARED = ("val/top1", "val/bins", "test/top1", "test/gflops")  # metrics in the tab HParams of TensorBoard


class MetricLogger:
    """Appends one JSON object per line to `metrics.jsonl`, and writes the same values to TensorBoard.

    Args:
        hyperparameters: of the run, for TensorBoard's comparison of runs; none: the run is not compared.
    """

    def __init__(self, folder: Path, hyperparameters: Mapping[str, str | float] = {}) -> None:
        self.metrics, self.tensorboard = folder / "metrics.jsonl", folder / "tensorboard"
        self.hyperparameters = hyperparameters
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
        for summary in self._hparams()[:2]:  # in the folder of the run: `add_hparams` of torch makes another run of them
            writer._get_file_writer().add_summary(summary)
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

    def write_validation(self, validation: Validation, *, step: int, epoch: int) -> None:
        """Log a validation after `step` steps, with its histograms and pictures. Does nothing before `open`."""
        self.write(step=step, epoch=epoch, split="val", values=validation.metrics)
        if self._writer is not None:
            with or_warn("TensorBoard lacks pictures of this validation"):
                add_validation(self._writer, validation, step)

    def end(self) -> None:
        """Log that the training has ended. Does nothing before `open`."""
        if self._writer is not None:
            for summary in self._hparams()[2:]:
                self._writer._get_file_writer().add_summary(summary)

    def write_test(self, values: Mapping[str, float], *, step: int) -> None:
        """Write the results of the test after the last `step` to TensorBoard. The logger may be closed.

        They are one step later than the last validation: a run that only tests again then replaces them when it opens the files.
        """
        with SummaryWriter(str(self.tensorboard)) as writer:
            _add_scalars(writer, step + 1, "test", values)

    def _hparams(self) -> tuple[Summary, ...]:
        """The experiment, the start and the end of this run, as the tab HParams reads them."""
        return hparams(dict(self.hyperparameters), dict.fromkeys(COMPARED, 0.0)) if self.hyperparameters else ()

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
