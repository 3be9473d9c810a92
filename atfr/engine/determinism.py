"""How exact and how repeatable torch's arithmetic is: TF32, and algorithms that give the same result each time."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import Iterator

import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
REPEATABLE = (":4096:8", ":16:8")  # its values at which cuBLAS gives the same result each time


def choose_algorithms(*, deterministic: bool, tf32: bool) -> None:
    """Set what `trainer.deterministic` and `trainer.tf32` ask for. Each process calls it before anything runs on a GPU.

    Raises:
        ValueError: `deterministic`, and the environment has another setting of cuBLAS.
    """
    # The older of torch's two interfaces. With the newer one, torch.backends.cudnn.flags and torch.compile of torch 2.11 raise an error.
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    # Set in any case: torch reads it once, and the next job of a sweep in this process may be deterministic.
    workspace = os.environ.setdefault(WORKSPACE, REPEATABLE[0])
    if deterministic and workspace not in REPEATABLE:
        raise ValueError(f"trainer.deterministic=true needs {WORKSPACE}={' or '.join(REPEATABLE)} in the environment, not {workspace!r}; unset it")
    if deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic)
    # Filling costs a pass over each new tensor, and all of them are written before they are read.
    torch.utils.deterministic.fill_uninitialized_memory = False


@contextmanager
def explaining_what_is_not_deterministic() -> Iterator[None]:
    """Raise ValueError, in one line, for torch's error about an operation that has no deterministic algorithm."""
    try:
        yield
    except RuntimeError as error:
        name, found, _ = str(error).partition(" does not have a deterministic implementation")
        if not found:
            raise
        message = f"trainer.deterministic=true, but torch has no deterministic algorithm for {name} on this device; set trainer.deterministic=false"
        raise ValueError(message) from error
