"""TF32 and deterministic algorithms of torch."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import Iterator

import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
REPEATABLE = (":4096:8", ":16:8")  # values with which cuBLAS is deterministic


def choose_algorithms(*, deterministic: bool, tf32: bool) -> None:
    """Apply `trainer.deterministic` and `trainer.tf32`. Each rank calls this before it uses a GPU.

    Raises:
        ValueError: `deterministic` is set, and the environment has another setting for cuBLAS.
    """
    # The older of two interfaces: with the newer one, torch.backends.cudnn.flags and torch.compile raise an error in torch 2.11.
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    # Always set: torch reads it once, and the next job of a sweep in this process may be deterministic.
    workspace = os.environ.setdefault(WORKSPACE, REPEATABLE[0])
    if deterministic and workspace not in REPEATABLE:
        raise ValueError(f"trainer.deterministic=true needs {WORKSPACE}={' or '.join(REPEATABLE)} in the environment, not {workspace!r}; unset it")
    if deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic)
    # Filling costs a pass over each new tensor, and this code writes every tensor before it reads it.
    torch.utils.deterministic.fill_uninitialized_memory = False


@contextmanager
def explaining_what_is_not_deterministic() -> Iterator[None]:
    """Turn torch's error about an operation without a deterministic algorithm into a ValueError of one line."""
    try:
        yield
    except RuntimeError as error:
        name, found, _ = str(error).partition(" does not have a deterministic implementation")
        if not found:
            raise
        message = f"trainer.deterministic=true, but torch has no deterministic algorithm for {name} on this device; set trainer.deterministic=false"
        raise ValueError(message) from error
