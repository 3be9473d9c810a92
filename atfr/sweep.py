"""What a sweep (`-m`) checks before it hands its jobs to hydra's launcher."""

from __future__ import annotations

import shutil
import signal
import sys
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from atfr.engine.interruption import heeded


class NeedsSlurm(Callback):
    """Ends a sweep of SLURM jobs with one line on a machine without SLURM, where submitit has a traceback."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        if not config.hydra.launcher._target_.endswith(".SlurmLauncher"):
            return
        for number in heeded():
            signal.signal(number, signal.SIG_DFL)  # this process only waits for the jobs, and has nothing to save
        if shutil.which("srun") is None:
            print("error: hydra/launcher=slurm needs SLURM, and there is no srun on this machine: start the sweep where sbatch works, or leave the launcher out", file=sys.stderr)
            sys.exit(1)
