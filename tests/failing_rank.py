"""An optimizer that cannot be made on one of the processes, for test_launch.py."""

from __future__ import annotations

import os
import signal

from torch import nn
from torch.optim import SGD


def optimizer(model: nn.Module, kind: str) -> SGD:
    """SGD on rank 0; on rank 1 the process fails: a `bug`, a user's `mistake`, or `killed`."""
    if os.environ["RANK"] == "1":
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("no such thing on rank 1") if kind == "bug" else ValueError("rank 1 was told nonsense")
    return SGD(model.parameters(), lr=0.1)
