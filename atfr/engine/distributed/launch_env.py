"""The launch environment of a process: started by torchrun, by srun, or alone."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SRUN = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID", "SLURM_STEP_ID")
FIRST_PORT, PORTS = 20000, 12000  # below 32768, where the ports begin that Linux assigns itself


@dataclass(frozen=True)
class LaunchEnv:
    """The rank of a process, and the address at which all `world` ranks connect."""

    launcher: str  # torchrun | srun | none
    rank: int = 0
    world: int = 1
    local_rank: int | None = 0  # on its machine; None: the launcher does not say
    address: str = ""
    port: int = 0
    keeps_store: bool = False  # whether this process hosts the store that the others connect to; torchrun may do so itself
    attempt: int = 0  # number of restarts by torchrun

    def device_index(self, gpus: int) -> int:
        """Return which of the `gpus` that this process sees it uses. srun may show each task a single one.

        Raises:
            ValueError: there are fewer GPUs than ranks on this machine, or the local rank is unknown.
        """
        if self.local_rank is None:
            raise ValueError("LOCAL_RANK, which chooses the GPU of a rank, is not set: start with torchrun, or set it")
        index = 0 if self.launcher == "srun" and gpus == 1 else self.local_rank
        if index >= gpus:
            raise ValueError(f"local rank {index} has no GPU, torch sees {gpus}: start fewer ranks on this machine, or set trainer.accelerator=cpu")
        return index


def read_launch_env(environment: Mapping[str, str]) -> LaunchEnv:
    """Read the variables of torchrun, or else those of an srun step with several tasks.

    A batch script, `salloc` and `srun -n1` are a single process, whatever SLURM_NTASKS is.

    Raises:
        ValueError: some variables of a launcher are missing, or one is not a number.
    """
    given = [name for name in TORCHRUN if name in environment]
    missing = [name for name in TORCHRUN if name not in environment]
    if given and missing:
        raise ValueError(f"the environment sets {', '.join(given)} but not {', '.join(sorted(missing))}: start with torchrun, or unset them")
    if given:
        rank, world = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
        return LaunchEnv(
            launcher="torchrun",
            rank=rank,
            world=world,
            local_rank=_number(environment, "LOCAL_RANK", default=0) if "LOCAL_RANK" in environment or world == 1 else None,
            address=environment["MASTER_ADDR"],
            port=_number(environment, "MASTER_PORT"),
            keeps_store=rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            attempt=_number(environment, "TORCHELASTIC_RESTART_COUNT", default=0),
        )
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS", default=1)
    return _srun_task(environment, tasks) if tasks > 1 else LaunchEnv(launcher="none")


def _srun_task(environment: Mapping[str, str], tasks: int) -> LaunchEnv:
    missing = [name for name in SRUN if name not in environment]
    if missing:
        raise ValueError(f"SLURM_STEP_NUM_TASKS={tasks} is set by srun, but {', '.join(missing)} is not set; start with srun, or unset it")
    rank = _number(environment, "SLURM_PROCID")
    # The steps of a job, and successive jobs, get different ports.
    offset = 16 * _number(environment, "SLURM_JOB_ID") + _number(environment, "SLURM_STEP_ID")
    return LaunchEnv(
        launcher="srun",
        rank=rank,
        world=tasks,
        local_rank=_number(environment, "SLURM_LOCALID"),
        address=hosts(environment["SLURM_STEP_NODELIST"])[0],
        port=FIRST_PORT + offset % PORTS,
        keeps_store=rank == 0,
    )


def hosts(nodelist: str) -> list[str]:
    """Expand a node list of SLURM: `node[01-03,7],gpu2` is node01, node02, node03, node7 and gpu2.

    Raises:
        ValueError: it is not a node list.
    """
    names: list[str] = []
    for item in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", nodelist):
        parts = [_numbers(part[1:-1], nodelist) if part.startswith("[") else [part] for part in re.findall(r"\[[^\]]*\]|[^\[]+", item)]
        names += ["".join(chosen) for chosen in itertools.product(*parts)]
    if not names or nodelist.count("[") != nodelist.count("]"):
        raise ValueError(f"SLURM_STEP_NODELIST={nodelist!r} is not a list of hosts")
    return names


def _numbers(ranges: str, nodelist: str) -> list[str]:
    found: list[str] = []
    for one in ranges.split(","):
        first, _, last = one.partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise ValueError(f"SLURM_STEP_NODELIST={nodelist!r} is not a list of hosts: {one!r} is not a range")
        found += [f"{number:0{len(first)}}" for number in range(int(first), int(last or first) + 1)]
    return found


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environment.get(name, None if default is None else str(default))
    if value is None or not value.isdigit():
        raise ValueError(f"the environment's {name}={value!r} is not a number; unset it, or start with torchrun or srun")
    return int(value)
