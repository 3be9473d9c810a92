"""Run the programs of tools/ in processes forked from one that has all imports behind it, which take longer than a small job."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from run_tools import ROOT

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["torch", "torch.utils.tensorboard", "torch.distributed.launcher.api", "hydra", "av", "atfr.launch", "atfr.jobs", "atfr.engine.train", "atfr.models.backbones.x3d"])


class Job:
    """One program of tools/ as the tasks of a launcher: `processes`, rank 0 first."""

    def __init__(self, name: str, *arguments: str, processes: int = 1, output: Path | None = None) -> None:
        """`output` gets what all of them print."""
        self.processes: list[ForkServerProcess] = []
        port = str(free_port())
        for rank in range(processes):
            torchrun = {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            process = _FORKS.Process(target=_run, args=(name, arguments, torchrun if processes > 1 else {}, output))
            process.start()
            self.processes.append(process)

    def wait(self, seconds: float = 300) -> list[int]:
        """The exit codes, once all have ended."""
        for process in self.processes:
            process.join(seconds)
            assert process.exitcode is not None, "the job does not end"
        return [process.exitcode for process in self.processes]

    def over(self) -> bool:
        return all(process.exitcode is not None for process in self.processes)

    def kill(self) -> None:
        for process in self.processes:
            os.kill(process.pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(name: str, arguments: tuple[str, ...], environment: dict[str, str], output: Path | None) -> None:
    file = os.open(output or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.update(environment)
    sys.argv = [str(ROOT / f"tools/{name}.py"), *arguments]
    import torch

    torch.set_num_threads(1)
    runpy.run_path(sys.argv[0], run_name="__main__")
