"""What test_launch.py and test_slurm.py have their processes train: a network that any number of them trains alike, an optimizer that fails on one."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from torch import nn
from torch.optim import SGD

from atfr.engine.distributed import comm


def network(num_classes: int) -> nn.Module:
    """No batch norm and no dropout, whose training depends on which clips a process has."""
    return nn.Sequential(nn.Conv3d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv3d(4, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, num_classes))


def failing_optimizer(model: nn.Module, lr: float, kind: str, **_: Any) -> SGD:
    """SGD on rank 0; on rank 1 the process fails: a `bug`, a user's `mistake`, or `killed`."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID")) == "1":
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("no such thing on rank 1") if kind == "bug" else ValueError("rank 1 was told nonsense")
    return SGD(model.parameters(), lr=lr)


class DawdlingSGD(SGD):
    """SGD in whose first `starts`, in a SLURM job, a step takes two seconds: it is still training when the job has to stop."""

    def __init__(self, *arguments: Any, starts: int, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.starts = starts

    def step(self, *arguments: Any) -> Any:
        if os.environ.get("SLURM_JOB_ID") and int(os.environ.get("SLURM_RESTART_COUNT", 0)) < self.starts:
            time.sleep(2)
        return super().step(*arguments)


def dawdling_optimizer(model: nn.Module, lr: float, starts: int, **_: Any) -> DawdlingSGD:
    return DawdlingSGD(model.parameters(), lr=lr, momentum=0.9, starts=starts)


def wait_for_data(failing: str) -> None:
    """Two tasks of srun, of which the one of rank `failing` fails where the first comes before the second."""
    try:
        dist_info = comm.start(accelerator="cpu", devices=None)
        with comm.main_first(dist_info):
            if dist_info.rank == int(failing):
                raise ValueError("no data")
        comm.barrier()
    except Exception as error:
        comm.tell_failure()
        print("another's fault" if comm.is_others_fault(error) else error, flush=True)
        os._exit(1)
