"""Where this process stands among the others, and the few collectives that the engine needs.

One process needs no launcher. Several are started by `torchrun`, which sets RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT; each collective below is then over all of them, and does nothing when
there is only one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from atfr.host_memory import keep_freed_memory

T = TypeVar("T")

LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process's rank among `world` processes, and the device it computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes files and prints."""
        return self.rank == 0

    def share(self, batch_size: int) -> int:
        """This process's part of a global batch. Raises ValueError if it cannot be cut evenly."""
        if batch_size < 1 or batch_size % self.world:
            raise ValueError(f"trainer.batch_size={batch_size} is the global batch: it must be a positive multiple of the {self.world} process(es)")
        return batch_size // self.world


def start(*, accelerator: str, devices: int | None) -> Ranks:
    """Join the other processes, if a launcher started any, and choose this one's device.

    Raises:
        ValueError: an unknown accelerator or one that is not there, a part of the launcher's
            variables missing, or another number of processes than `devices`.
    """
    given = [name for name in LAUNCHER if name in os.environ]
    missing = [name for name in LAUNCHER if name not in os.environ]
    if given and missing:
        raise ValueError(f"the environment sets {', '.join(given)} but not {', '.join(sorted(missing))}: start with torchrun, or unset them")
    rank, world = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if given else (0, 1)
    if devices is not None and devices != world:
        raise ValueError(f"trainer.devices={devices}, but {world} process(es) run: start with `torchrun --nproc_per_node={devices} tools/train.py ...`")
    if accelerator not in ("auto", "cpu", "cuda"):
        raise ValueError(f"trainer.accelerator={accelerator!r} does not exist; choose one of auto, cpu, cuda")
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise ValueError("trainer.accelerator=cuda, but torch sees no GPU; set trainer.accelerator=cpu or auto")
    device = torch.device("cpu")
    if accelerator != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    if given and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world)
    return Ranks(rank, world, device)


def stop() -> None:
    """Leave the process group, if one was joined."""
    global _host_group
    _host_group = None
    if dist.is_initialized():
        dist.destroy_process_group()


def replicate(model: nn.Module, ranks: Ranks) -> nn.Module:
    """The model whose gradients are averaged over all processes: DDP, or itself when alone."""
    if ranks.world == 1:
        return model
    ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids)


def barrier() -> None:
    """Wait for every process."""
    if dist.is_initialized():
        dist.barrier()


def summed(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes (in place)."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


_host_group: dist.ProcessGroup | None = None


def any_process(flag: bool) -> bool:
    """Whether it is true on at least one process. Between the hosts' memories, so that no GPU is waited for."""
    global _host_group
    if not dist.is_initialized():
        return flag
    if _host_group is None:
        _host_group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
    value = torch.tensor([int(flag)])
    dist.all_reduce(value, group=_host_group)
    return bool(value.item())


def broadcast_buffers(model: nn.Module) -> None:
    """Give every process the main process's buffers, such as the running statistics of batch norms."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def gathered(values: list[T]) -> list[T]:
    """The concatenation of every process's list, in rank order, on every process."""
    if not dist.is_initialized():
        return values
    parts: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]
