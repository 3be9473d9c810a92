"""The same weights, to the last bit, from the same command."""

from __future__ import annotations

import os

import torch


def be_deterministic() -> None:
    """Only algorithms that give the same result each time; slower, and an error where there is none (torch's message names the operation).

    To be called before anything runs on a GPU.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
