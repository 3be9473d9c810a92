"""Run programs in processes forked from one that has all imports behind it, which take longer than a small job."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import runpy
import signal
import socket
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Callable

from run_tools import ROOT

from atfr.engine.distributed.launch_env import read_launch_env

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["torch", "torch.utils.tensorboard", "torch.distributed.launcher.api", "hydra", "av", "atfr.cli.launch", "atfr.cli.builders", "atfr.engine.trainer", "atfr.models.backbones.x3d"])
_steps = itertools.count(50 * os.getpid())  # test processes that run beside each other have ports of their own


class Job:
    """One program of tools/ as so many processes, rank 0 first, as torchrun or srun start them; a single one has no launcher."""

    def __init__(self, name: str, *arguments: str, processes: int = 1, launcher: str = "torchrun", output: Path | None = None, **environment: str) -> None:
        """`output` gets what all of them print; `environment` is added to ours."""
        places = {"torchrun": torchrun_places, "srun": srun_places}[launcher](processes) if processes > 1 else [{}]
        self.processes = [start_tool(name, *arguments, output=output, **environment, **place) for place in places]

    def wait(self, seconds: float = 300) -> list[int]:
        """The exit codes, once all have ended."""
        return [ended(process, seconds) for process in self.processes]

    def over(self) -> bool:
        return all(process.exitcode is not None for process in self.processes)

    def kill(self) -> None:
        for process in self.processes:
            os.kill(process.pid, signal.SIGKILL)


def torchrun_places(processes: int) -> list[dict[str, str]]:
    """The variables of each process, which meet at a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def srun_places(processes: int) -> list[dict[str, str]]:
    """The variables of the tasks of a step, each on a machine of its own; the port that follows from them is free."""
    while True:
        shared = {"SLURM_JOB_ID": str(next(_steps)), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(processes), "SLURM_STEP_NODELIST": f"127.0.0.[1-{processes}]"}
        places = [{**shared, "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0"} for rank in range(processes)]
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", read_launch_env(places[0]).port)) != 0:
                return places


def start_tool(name: str, *arguments: str, output: Path | None = None, cwd: Path | None = None, **environment: str) -> ForkServerProcess:
    """A program of tools/; `environment` is added to ours."""
    return start(_tool, str(ROOT / f"tools/{name}.py"), arguments, output=output, cwd=cwd, **environment)


def start(function: Callable[..., None], *arguments: Any, output: Path | None = None, cwd: Path | None = None, **environment: str) -> ForkServerProcess:
    """A function of a module, in a process of its own."""
    process = _FORKS.Process(target=_run, args=(function, arguments, output, cwd, environment))
    process.start()
    return process


def start_together(function: Callable[..., None], *arguments: Any, processes: int, output: Path | None = None) -> list[ForkServerProcess]:
    """The same, as the processes that torchrun starts."""
    return [start(function, *arguments, output=output, **place) for place in torchrun_places(processes)]


def ended(process: ForkServerProcess, seconds: float = 300) -> int:
    """Its exit code, once there is one."""
    process.join(seconds)
    assert process.exitcode is not None, "it does not end"
    return process.exitcode


def _run(function: Callable[..., None], arguments: tuple, output: Path | None, cwd: Path | None, environment: dict[str, str]) -> None:
    file = os.open(output or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.update({"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests/helpers'}", **environment})  # for those that it starts itself
    multiprocessing.set_start_method("fork", force=True)  # of what it starts itself: as in a process that was not forked
    if cwd is not None:
        os.chdir(cwd)
    import torch

    torch.set_num_threads(1)
    function(*arguments)


def _tool(program: str, arguments: tuple[str, ...]) -> None:
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")
