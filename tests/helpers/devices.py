"""Which GPUs the processes of the tests see: none, but for those that a test with the marker `gpu` starts.

The pytest process never uses a GPU. A test with the marker runs programs and functions in processes of their own, with the
variables of `seeing`.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any, Callable

import torch

GIVEN = "ATFR_TEST_CUDA_VISIBLE_DEVICES"  # CUDA_VISIBLE_DEVICES as pytest was started with; xdist's workers inherit it
ALL = "all"


def hide_gpus() -> None:
    """Hide all GPUs from this process and those that it starts. CUDA reads the variable once, so this comes first."""
    if torch.cuda.is_initialized():
        raise RuntimeError("CUDA is in use already: the tests cannot hide the GPUs from this process")
    os.environ.setdefault(GIVEN, os.environ.get("CUDA_VISIBLE_DEVICES", ALL))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def seeing(count: int = 1) -> dict[str, str]:
    """The variables of a process that sees at most `count` of the GPUs that pytest was given."""
    given = os.environ[GIVEN]
    shown = [str(number) for number in range(count)] if given == ALL else given.split(",")[:count]
    return {"CUDA_VISIBLE_DEVICES": ",".join(shown)}


@functools.cache
def number_of_gpus(most: int) -> int:
    """How many GPUs torch sees in a process of `seeing(most)`."""
    from forked import ended, start

    return ended(start(_exit_with_count, **seeing(most)))


def _exit_with_count() -> None:
    sys.exit(torch.cuda.device_count() if torch.cuda.is_available() else 0)


def on_gpu(function: Callable[..., None], *arguments: Any, output: Path, count: int = 1) -> None:
    """Call a function of a module in a process that sees `count` GPUs, and fail with what it printed if it fails."""
    from forked import ended, start

    code = ended(start(function, *arguments, output=output, **seeing(count)))
    assert code == 0, output.read_text()
