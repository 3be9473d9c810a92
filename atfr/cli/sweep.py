"""Hydra callbacks that run when a sweep (`-m`) starts or ends."""

from __future__ import annotations

import shutil
import signal
import sys
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, read_write

from atfr.cli.command.arguments import parse, quoted
from atfr.cli.command.run_name import SWEEPS, SWEPT, report_command
from atfr.engine.distributed.preemption import handled_signals


class NeedsSlurm(Callback):
    """Exit with one line if a sweep of SLURM jobs starts on a machine without SLURM, where submitit prints a traceback."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        if not config.hydra.launcher._target_.endswith(".SlurmLauncher"):
            return
        for number in handled_signals():
            signal.signal(number, signal.SIG_DFL)  # this process only waits for the jobs, and has nothing to save
        if shutil.which("srun") is None:
            print("error: hydra/launcher=slurm needs SLURM, and there is no srun on this machine: start the sweep where sbatch works, or leave the launcher out", file=sys.stderr)
            sys.exit(1)


class TellsWhatIsSwept(Callback):
    """Pass the keys that have several values to each job through its environment, for the name of its folder."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        arguments = [*(f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()), *config.hydra.overrides.task]
        overrides = [override for override in map(parse, arguments) if override is not None]
        swept = sorted({override.get_key_element().lstrip("+") for override in overrides if override.is_sweep_override()})
        with read_write(config):
            config.hydra.overrides.hydra.append(f"+hydra.job.env_set.{SWEPT}={quoted(','.join(swept))}")


class NamesReport(Callback):
    """Print the command for a report about the runs of a sweep of trainings at its end."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        # Jobs with another output_dir are elsewhere; those without a test, and dry runs, leave nothing to report.
        nothing = any(override.lstrip("+").startswith(("trainer.output_dir=", "trainer.test=", "dry_run=")) for override in config.hydra.overrides.task)
        if config.hydra.job.name == "train" and not nothing:
            print(report_command(SWEEPS), flush=True)
