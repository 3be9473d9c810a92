"""A trace of a few training steps, for chrome://tracing or https://ui.perfetto.dev."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED, WARM_UP = 2, 1  # steps before those that are recorded: start-up, and that of the profiler


def profiler(folder: Path, steps: int) -> AbstractContextManager:
    """Records `steps` steps into `folder/trace.json`; call `.step()` of what it enters as after each step. None for 0 steps."""
    if not steps:
        return nullcontext()

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
