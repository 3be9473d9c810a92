"""What a sweep (`-m`) checks before it hands its jobs to hydra's launcher."""

from __future__ import annotations

import shutil
import sys
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class NeedsSlurm(Callback):
    """Ends a sweep of SLURM jobs with one line on a machine without SLURM, where submitit has a traceback."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        if config.hydra.launcher._target_.endswith(".SlurmLauncher") and shutil.which("srun") is None:
            print("error: hydra/launcher=slurm needs SLURM, and there is no srun on this machine: start the sweep where sbatch works, or leave the launcher out", file=sys.stderr)
            sys.exit(1)
