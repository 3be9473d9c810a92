"""Where this process stands among the others, and the few collectives that the engine needs.

One process needs no launcher. Where there are several (`place.py`), each collective below is over all
of them; it does nothing when there is only one.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from atfr.engine.place import Place, find_place
from atfr.engine.run_folder import flat
from atfr.host_memory import keep_freed_memory

T = TypeVar("T")

JOIN = timedelta(minutes=5)  # for all processes to be there
TALK = timedelta(minutes=30)  # for one collective: the main process may generate a dataset while the others wait
_joined = itertools.count()  # a sweep's jobs under one torchrun join one after another


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
            variables missing, another number of processes than `devices`, or the others were not
            there in time.
    """
    place = find_place(os.environ)
    if devices is not None and devices != place.world:
        raise ValueError(f"trainer.devices={devices}, but {place.world} process(es) run: it counts those of all machines; leave it out under a launcher")
    device = torch.device("cpu")
    if uses_gpu(accelerator):
        device = torch.device("cuda", place.device_index(torch.cuda.device_count()))
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if place.launcher != "none" and not dist.is_initialized():
        _join(place, device)
    return Ranks(place.rank, place.world, device)


def uses_gpu(accelerator: str) -> bool:
    """Whether `trainer.accelerator` means a GPU here. Raises ValueError if it asks for one that is not there, or for something else."""
    if accelerator not in ("auto", "cpu", "cuda"):
        raise ValueError(f"trainer.accelerator={accelerator!r} does not exist; choose one of auto, cpu, cuda")
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise ValueError("trainer.accelerator=cuda, but torch sees no GPU; set trainer.accelerator=cpu or auto")
    return accelerator != "cpu" and torch.cuda.is_available()


def _join(place: Place, device: torch.device) -> None:
    store = dist.PrefixStore(f"{place.attempt}/{next(_joined)}", _store(place))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=place.rank, world_size=place.world, timeout=TALK)


@functools.cache
def _store(place: Place) -> dist.Store:
    try:
        return dist.TCPStore(
            place.address,
            place.port,
            world_size=place.world,
            is_master=place.keeps_store,
            timeout=JOIN,
            wait_for_workers=place.launcher == "srun",  # torchrun watches its processes itself
        )
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"process {place.rank} of {place.world} could not meet the others at {place.address}:{place.port} within {JOIN.seconds} s: {reason};"
            " another job may use that port, or a process did not start"
        ) from error


def require_same(config: Mapping[str, Any]) -> None:
    """Raise ValueError on every process, naming the first key, unless all of them have the same config."""
    configs = [flat(one) for one in gathered([config])]
    for key in sorted(set().union(*configs)):
        ranks: dict[str, list[str]] = {}
        for rank, one in enumerate(configs):
            ranks.setdefault(repr(one[key]) if key in one else "not there", []).append(str(rank))
        if len(ranks) > 1:
            found = ", ".join(f"{value} on rank {','.join(those)}" for value, those in ranks.items())
            raise ValueError(f"the processes have different configs: {key} is {found}; start all of them with the same command")


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
    ddp = nn.parallel.DistributedDataParallel
    # Running statistics are not used in training, and before an evaluation all processes get the same ones.
    option = next(name for name in ("forward_sync_buffers", "broadcast_buffers") if name in inspect.signature(ddp).parameters)  # the newer name first
    return ddp(model, device_ids=ids, **{option: False})


def is_joined() -> bool:
    """Whether there are other processes to talk to."""
    return dist.is_initialized()


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


def largest(number: int) -> int:
    """The largest of all processes' numbers. Between the hosts' memories, so that no GPU is waited for."""
    global _host_group
    if not dist.is_initialized():
        return number
    if _host_group is None:
        _host_group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
    value = torch.tensor([number])
    dist.all_reduce(value, dist.ReduceOp.MAX, group=_host_group)
    return int(value.item())


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
