"""A trace of a few training steps, for chrome://tracing or https://ui.perfetto.dev."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED, WARM_UP = 2, 1  # steps before the recorded ones: start-up, and warm-up of the profiler


def profiler(folder: Path, steps: int) -> profile | None:
    """Return a profiler that records `steps` steps to `folder/trace.json`, or None for 0. Call its `step()` after each step."""
    if not steps:
        return None

    def write(done: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        done.export_chrome_trace(str(folder / "trace.json"))

    gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    return profile(
        activities=[ProfilerActivity.CPU, *gpu],
        schedule=schedule(wait=SKIPPED, warmup=WARM_UP, active=steps, repeat=1),
        on_trace_ready=write,
        record_shapes=True,
    )
