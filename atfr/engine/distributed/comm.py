"""The ranks of a job, and the collectives that the engine needs.

One process needs no launcher. The collectives run over all ranks, and do nothing if there is only one.
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
from atfr.engine.distributed.rendezvous import FAILED, OtherFailed, join_store, wait_until
from atfr.engine.run.run_dir import flat
from atfr.utils.malloc import keep_freed_memory

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # work that may take longer is in `main_first`
_joined, _blocks = itertools.count(), itertools.count()  # the jobs of a sweep under one torchrun join one after the other
_store: dist.Store | None = None  # of the ranks that have joined


@dataclass(frozen=True)
class DistInfo:
    """The rank of this process among `world` ranks, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def share(self, batch_size: int) -> int:
        """Return the largest number of clips of a global batch on one rank. Other ranks may have one fewer."""
        return -(-batch_size // self.world)


def start(*, accelerator: str, devices: int | None) -> DistInfo:
    """Join the other ranks, if a launcher started any, and choose the device of this one.

    Raises:
        ValueError: the accelerator is unknown or missing, a variable of the launcher is missing, the number of ranks is not
            `devices`, or not all ranks joined in time.
    """
    env = read_launch_env(os.environ)
    if devices is not None and devices != env.world:
        raise ValueError(f"trainer.devices={devices}, but there are {env.world} ranks on all machines together; leave it out under a launcher")
    device = torch.device("cpu")
    if uses_gpu(accelerator):
        device = torch.device("cuda", env.device_index(torch.cuda.device_count()))
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if env.launcher != "none" and not dist.is_initialized():
        _join(env, device)
    return DistInfo(env.rank, env.world, device)


def uses_gpu(accelerator: str) -> bool:
    """Return whether `trainer.accelerator` means a GPU here. Raises ValueError if it is unknown, or asks for a GPU that is missing."""
    if accelerator not in ("auto", "cpu", "cuda"):
        raise ValueError(f"trainer.accelerator={accelerator!r} does not exist; choose one of auto, cpu, cuda")
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise ValueError("trainer.accelerator=cuda, but torch sees no GPU; set trainer.accelerator=cpu or auto")
    return accelerator != "cpu" and torch.cuda.is_available()


def _join(env: LaunchEnv, device: torch.device) -> None:
    global _store
    _store = join_store(env, device, next(_joined))
    # Objects, plain numbers and barriers use gloo: they do not wait for a GPU, and notice at once that a rank is gone.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("group", _store), rank=env.rank, world_size=env.world, timeout=COLLECTIVE_TIMEOUT)


@contextmanager
def main_first(dist_info: DistInfo) -> Iterator[None]:
    """Run this block on rank 0 first. The other ranks wait without a timeout, then run it too.

    Raises:
        OtherFailed: it failed on rank 0.
    """
    key = f"done/{next(_blocks)}"
    if _store is not None and not dist_info.is_main:
        wait_until(lambda: _store.check([key]) or _store.check([FAILED]), math.inf)
        if not _store.check([key]):
            raise OtherFailed
    yield
    if _store is not None and dist_info.is_main:
        _store.set(key, "")


def tell_failure() -> None:
    """Tell the ranks that wait in `main_first` that this one is about to end with an error."""
    if _store is not None:
        with suppress(dist.DistError):
            _store.set(FAILED, "")


def is_others_fault(error: BaseException) -> bool:
    """Return whether a collective failed, most likely because another rank ended. That rank has printed the cause."""
    return isinstance(error, (OtherFailed, dist.DistError)) or (type(error) is RuntimeError and "gloo" in str(error))


def require_same(values: Mapping[str, Any], *, of: str, remedy: str) -> None:
    """Raise ValueError on all ranks unless they have the same values; names the first key that differs.

    Args:
        of: what the values are, for the message.
    """
    by_rank = [flat(one) for one in gathered([values])]
    for key in sorted(set().union(*by_rank)):
        ranks: dict[str, list[str]] = {}
        for rank, one in enumerate(by_rank):
            ranks.setdefault(repr(one[key]) if key in one else "missing", []).append(str(rank))
        if len(ranks) > 1:
            found = ", ".join(f"{value} on rank {','.join(those)}" for value, those in ranks.items())
            raise ValueError(f"the ranks have different {of}: {key} is {found}; {remedy}")


def require_shared(folder: Path, dist_info: DistInfo) -> None:
    """Create a folder, and raise ValueError on all ranks unless all of them see the same one."""
    if dist_info.world == 1:
        return
    folder.mkdir(parents=True, exist_ok=True)
    # A new name, which no machine can have cached as missing.
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
    """Wrap the model in DDP, which averages its gradients over all ranks; a single rank gets the model itself."""
    if dist_info.world == 1:
        return model
    ids = [dist_info.device.index] if dist_info.device.type == "cuda" else None
    ddp = nn.parallel.DistributedDataParallel
    # Training does not use running statistics, and all ranks get the same ones before an evaluation.
    option = next(name for name in ("forward_sync_buffers", "broadcast_buffers") if name in inspect.signature(ddp).parameters)  # the newer name first
    network = ddp(model, device_ids=ids, gradient_as_bucket_view=True, **{option: False})
    if dist_info.world > 2 and torch.are_deterministic_algorithms_enabled():
        network.register_comm_hook(None, lambda _, bucket: _mean_in_rank_order(bucket))
    return network


def _mean_in_rank_order(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average a bucket of gradients, adding the ranks in their order.

    The order in which an all-reduce adds depends on the position in the bucket, and DDP rebuilds its buckets after the first step.
    With three ranks or more, a resumed run would differ from an uninterrupted one in the last digits.
    """
    own, world = bucket.buffer(), dist.get_world_size()
    gathered_grads = own.new_empty(world * own.numel())

    def mean(done: torch.futures.Future) -> Tensor:
        done.value()  # raises if the exchange failed
        first, *others = gathered_grads.view(world, -1)
        for other in others:
            first += other
        return first.div_(world)

    return dist.all_gather_into_tensor(gathered_grads, own, async_op=True).get_future().then(mean)


def is_joined() -> bool:
    """Return whether there are several ranks."""
    return dist.is_initialized() and dist.get_world_size() > 1


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def summed(value: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def largest(number: int) -> int:
    """Return the largest of the ranks' numbers. Reduced on the hosts, without waiting for a GPU."""
    if not dist.is_initialized():
        return number
    value = torch.tensor([number])
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value.item())


class DelayedMax:
    """`largest` as an asynchronous all-reduce. Each call returns the result of the previous one, the first 0. A single rank gets its own number."""

    def __init__(self) -> None:
        self._pending: tuple[dist.Work, Tensor] | None = None

    def largest(self, number: int) -> int:
        if not dist.is_initialized():
            return number
        previous, value = self._pending, torch.tensor([number])
        self._pending = dist.all_reduce(value, dist.ReduceOp.MAX, async_op=True), value
        if previous is None:
            return 0
        previous[0].wait()
        return int(previous[1].item())


def stop_together(stop: StopFlag | None, where: str) -> None:
    """Raise Interrupted on all ranks if one of them received a signal. All ranks must call this."""
    number = 0 if stop is None else largest(stop.signal or 0)
    if number:
        raise Interrupted(number, where)


def broadcast_buffers(model: nn.Module) -> None:
    """Copy the buffers of rank 0, such as the running statistics of batch norms, to all ranks."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def gathered(values: list[T]) -> list[T]:
    """Concatenate the lists of all ranks in rank order, on each rank."""
    if not dist.is_initialized():
        return values
    parts: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]
