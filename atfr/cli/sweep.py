"""What a sweep (`-m`) checks and notes before it hands its jobs to hydra's launcher."""

from __future__ import annotations

import shutil
import signal
import sys
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, read_write

from atfr.cli.arguments import parse, quoted
from atfr.cli.run_name import SWEPT
from atfr.engine.distributed.preemption import handled_signals


class NeedsSlurm(Callback):
    """Ends a sweep of SLURM jobs with one line on a machine without SLURM, where submitit has a traceback."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        if not config.hydra.launcher._target_.endswith(".SlurmLauncher"):
            return
        for number in handled_signals():
            signal.signal(number, signal.SIG_DFL)  # this process only waits for the jobs, and has nothing to save
        if shutil.which("srun") is None:
            print("error: hydra/launcher=slurm needs SLURM, and there is no srun on this machine: start the sweep where sbatch works, or leave the launcher out", file=sys.stderr)
            sys.exit(1)


class TellsWhatIsSwept(Callback):
    """Puts the keys that have several values into the environment of each job, wherever that runs, for the name of its folder."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        arguments = [*(f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()), *config.hydra.overrides.task]
        overrides = [override for override in map(parse, arguments) if override is not None]
        swept = sorted({override.get_key_element().lstrip("+") for override in overrides if override.is_sweep_override()})
        with read_write(config):
            config.hydra.overrides.hydra.append(f"+hydra.job.env_set.{SWEPT}={quoted(','.join(swept))}")
