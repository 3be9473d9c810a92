"""The steps that a training has logged so far."""

from __future__ import annotations

import json
import time
from pathlib import Path

from forked import Job


def wait_for_steps(folder: Path, steps: int, job: Job) -> None:
    """Wait until a number of steps is logged, or the job is over."""
    deadline = time.monotonic() + 200
    while not job.over() and len(logged(folder)["train"]) < steps:
        assert time.monotonic() < deadline, "the training makes no progress"
        time.sleep(0.01)


def logged(folder: Path) -> dict[str, list[dict]]:
    """Read the complete lines of metrics.jsonl, by split."""
    found: dict[str, list[dict]] = {"train": [], "val": []}
    if (folder / "metrics.jsonl").exists():
        for line in (folder / "metrics.jsonl").read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                entry = json.loads(line)
                found[entry["split"]].append(entry)
    return found
