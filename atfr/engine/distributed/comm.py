"""Where this process stands among the others, and the few collectives that the engine needs.

One process needs no launcher. Where there are several (`place.py`), each collective below is over all
of them; it does nothing when there is only one.
"""

from __future__ import annotations

import inspect
import itertools
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from atfr.engine.distributed.launch_env import LaunchEnv, read_launch_env
from atfr.engine.distributed.preemption import Interrupted, StopFlag
from atfr.engine.distributed.rendezvous import FAILED, OtherFailed, meet, wait_until
from atfr.engine.run.run_dir import flat
from atfr.utils.malloc import keep_freed_memory

T = TypeVar("T")

TALK = timedelta(minutes=10)  # for one collective; what may take longer is in `main_first`
_joined, _turns = itertools.count(), itertools.count()  # a sweep's jobs under one torchrun join one after another
_store: dist.Store | None = None  # of the processes that have joined


@dataclass(frozen=True)
class DistInfo:
    """This process's rank among `world` processes, and the device it computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes files and prints."""
        return self.rank == 0

    def share(self, batch_size: int) -> int:
        """The most clips of a global batch that a process has: where it does not divide, some have one fewer."""
        return -(-batch_size // self.world)


def start(*, accelerator: str, devices: int | None) -> DistInfo:
    """Join the other processes, if a launcher started any, and choose this one's device.

    Raises:
        ValueError: an unknown accelerator or one that is not there, a part of the launcher's
            variables missing, another number of processes than `devices`, or the others were not
            there in time.
    """
    place = read_launch_env(os.environ)
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
    return DistInfo(place.rank, place.world, device)


def uses_gpu(accelerator: str) -> bool:
    """Whether `trainer.accelerator` means a GPU here. Raises ValueError if it asks for one that is not there, or for something else."""
    if accelerator not in ("auto", "cpu", "cuda"):
        raise ValueError(f"trainer.accelerator={accelerator!r} does not exist; choose one of auto, cpu, cuda")
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise ValueError("trainer.accelerator=cuda, but torch sees no GPU; set trainer.accelerator=cpu or auto")
    return accelerator != "cpu" and torch.cuda.is_available()


def _join(place: LaunchEnv, device: torch.device) -> None:
    global _store
    _store = meet(place, device, next(_joined))
    # Objects, plain numbers and barriers go from host to host: no GPU is waited for, and a process that is gone is noticed at once.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("group", _store), rank=place.rank, world_size=place.world, timeout=TALK)


@contextmanager
def main_first(dist_info: DistInfo) -> Iterator[None]:
    """The main process is through with this block before any other begins it, however long it takes.

    Raises:
        OtherFailed: it failed there.
    """
    key = f"through/{next(_turns)}"
    if _store is not None and not dist_info.is_main:
        wait_until(lambda: _store.check([key]) or _store.check([FAILED]), math.inf)
        if not _store.check([key]):
            raise OtherFailed
    yield
    if _store is not None and dist_info.is_main:
        _store.set(key, "")


def tell_failure() -> None:
    """Let those who wait in `main_first` know that this process is about to end with an error."""
    if _store is not None:
        with suppress(dist.DistError):
            _store.set(FAILED, "")


def is_others_fault(error: BaseException) -> bool:
    """Whether a collective failed, most often since another process is gone, which has said why."""
    return isinstance(error, (OtherFailed, dist.DistError)) or (type(error) is RuntimeError and "gloo" in str(error))


def require_same(values: Mapping[str, Any], *, of: str, remedy: str) -> None:
    """Raise ValueError on every process, naming the first key, unless all of them have the same values (`of` what they are)."""
    all_of_them = [flat(one) for one in gathered([values])]
    for key in sorted(set().union(*all_of_them)):
        ranks: dict[str, list[str]] = {}
        for rank, one in enumerate(all_of_them):
            ranks.setdefault(repr(one[key]) if key in one else "not there", []).append(str(rank))
        if len(ranks) > 1:
            found = ", ".join(f"{value} on rank {','.join(those)}" for value, those in ranks.items())
            raise ValueError(f"the processes have different {of}: {key} is {found}; {remedy}")


def require_shared(folder: Path, dist_info: DistInfo) -> None:
    """Raise ValueError on every process unless all of them see the same folder, which is made for that."""
    if dist_info.world == 1:
        return
    folder.mkdir(parents=True, exist_ok=True)
    # A name that no machine has asked for before, so that none remembers that it was not there.
    (name,) = gathered([f".seen-{uuid.uuid4().hex}"] if dist_info.is_main else [])
    token = folder / name
    if dist_info.is_main:
        token.touch()
    barrier()
    blind = [str(rank) for rank, sees in enumerate(gathered([token.exists()])) if not sees]
    if dist_info.is_main:
        token.unlink()
    if blind:
        raise ValueError(f"rank {', '.join(blind)} does not see the run folder {folder} of rank 0: it must be on a disk that all machines share; set trainer.output_dir")


def stop() -> None:
    """Leave the process group, if one was joined."""
    global _store
    _store = None
    if dist.is_initialized():
        dist.destroy_process_group()


def replicate(model: nn.Module, dist_info: DistInfo) -> nn.Module:
    """The model whose gradients are averaged over all processes: DDP, or itself when alone."""
    if dist_info.world == 1:
        return model
    ids = [dist_info.device.index] if dist_info.device.type == "cuda" else None
    ddp = nn.parallel.DistributedDataParallel
    # Running statistics are not used in training, and before an evaluation all processes get the same ones.
    option = next(name for name in ("forward_sync_buffers", "broadcast_buffers") if name in inspect.signature(ddp).parameters)  # the newer name first
    network = ddp(model, device_ids=ids, **{option: False})
    if dist_info.world > 2 and torch.are_deterministic_algorithms_enabled():
        network.register_comm_hook(None, lambda _, bucket: _mean_in_rank_order(bucket))
    return network


def _mean_in_rank_order(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average a bucket of gradients by adding up the processes' in the order of their ranks.

    An all-reduce adds them in an order that depends on their place in the bucket, and DDP rearranges its buckets after
    the first step: from three processes on, a run that was resumed would differ from one that was not in the last digits.
    """
    own, world = bucket.buffer(), dist.get_world_size()
    everyones = own.new_empty(world * own.numel())

    def mean(done: torch.futures.Future) -> Tensor:
        done.value()  # raises where the exchange failed
        first, *others = everyones.view(world, -1)
        for other in others:
            first += other
        return first.div_(world)

    return dist.all_gather_into_tensor(everyones, own, async_op=True).get_future().then(mean)


def is_joined() -> bool:
    """Whether there are other processes to talk to."""
    return dist.is_initialized() and dist.get_world_size() > 1


def barrier() -> None:
    """Wait for every process."""
    if dist.is_initialized():
        dist.barrier()


def summed(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes (in place)."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def largest(number: int) -> int:
    """The largest of all processes' numbers. It is reduced on the hosts, without waiting for a GPU."""
    if not dist.is_initialized():
        return number
    value = torch.tensor([number])
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value.item())


class DelayedMax:
    """`largest` without waiting for the other processes: each call gives what was asked in the one before it, at first 0. Alone, its own number."""

    def __init__(self) -> None:
        self._asked: tuple[dist.Work, Tensor] | None = None

    def largest(self, number: int) -> int:
        if not dist.is_initialized():
            return number
        before, value = self._asked, torch.tensor([number])
        self._asked = dist.all_reduce(value, dist.ReduceOp.MAX, async_op=True), value
        if before is None:
            return 0
        before[0].wait()
        return int(before[1].item())


def stop_together(stop: StopFlag | None, where: str) -> None:
    """Raise Interrupted on every process if one of them was told to stop. All of them come here."""
    number = 0 if stop is None else largest(stop.signal or 0)
    if number:
        raise Interrupted(number, where)


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
