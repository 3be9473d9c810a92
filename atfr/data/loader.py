"""Which process gets which clips, and the DataLoaders that read them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from atfr.data.dataset import collate


class TrainSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for one process, to be used as a DataLoader's batch_sampler.

    The order depends on the seed and the epoch alone: the k-th global batch of an epoch is
    `permutation[k * G : (k + 1) * G]`, of which process r of `world` takes every world-th, from the r-th on. The last
    partial batch of an epoch is dropped. With fewer videos than G an epoch is one batch that goes around the
    permutation as often as needed; an index then grows by `size` a round, so that TrainClips cuts another clip.

    `start_step` (batches since the start of training) sets epoch and place for a resume; `set_epoch` moves on. The
    epoch travels in the index, so workers may be persistent.
    """

    def __init__(
        self, size: int, *, seed: int, global_batch: int, rank: int = 0, world: int = 1, start_step: int = 0
    ) -> None:
        if size < 1:
            raise ValueError(f"there are {size} training videos, at least 1 is needed")
        if global_batch < 1 or global_batch % world:
            raise ValueError(f"the batch size {global_batch} does not divide evenly among {world} processes")
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank}, it must be in [0, {world})")
        if start_step < 0:
            raise ValueError(f"start_step is {start_step}, it must not be negative")
        self.size = size
        self.seed = seed
        self.global_batch = global_batch
        self.rank = rank
        self.world = world
        self.epoch, self.start_batch = divmod(start_step, len(self))

    def __len__(self) -> int:
        """Batches in a whole epoch, wherever this one starts."""
        return max(1, self.size // self.global_batch)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """The next iteration goes over `epoch`, from its `start_batch`-th batch on."""
        if not 0 <= start_batch < len(self):
            raise ValueError(f"start_batch is {start_batch}, the epoch has {len(self)} batches")
        self.epoch = epoch
        self.start_batch = start_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # Copied now: a DataLoader draws ahead, and set_epoch may be called before it is through.
        epoch, first = self.epoch, self.start_batch
        order = np.random.default_rng((self.seed, epoch)).permutation(self.size)
        rounds = -(-self.global_batch // self.size)
        order = np.concatenate([order + turn * self.size for turn in range(rounds)])
        for batch in range(first, len(self)):
            chosen = order[batch * self.global_batch : (batch + 1) * self.global_batch]
            yield [(epoch, int(index)) for index in chosen[self.rank :: self.world]]


def train_loader(
    dataset: Dataset, *, sampler: TrainSampler, workers: int = 0, timeout_s: float = 0.0, pin_memory: bool = False
) -> DataLoader:
    """Batches of TrainClips in the order of `sampler`, which also fixes their size in this process.

    With workers, a batch that takes longer than `timeout_s` seconds (0: no limit) raises RuntimeError.
    """
    return DataLoader(dataset, batch_sampler=sampler, **_settings(workers, timeout_s, pin_memory))


def test_loader(
    dataset: Dataset,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    timeout_s: float = 0.0,
    pin_memory: bool = False,
) -> DataLoader:
    """Every world-th item of TestClips from the rank-th on: over all processes each view comes exactly once.

    `batch_size` is per process. Processes may have one item more or less than others, or none, so nothing that waits
    for all of them belongs inside the loop. `timeout_s` as in `train_loader`.
    """
    if batch_size < 1:
        raise ValueError(f"the batch size of a process is {batch_size}, it must be at least 1")
    if not 0 <= rank < world:
        raise ValueError(f"rank is {rank}, it must be in [0, {world})")
    items = range(rank, len(dataset), world)  # type: ignore[arg-type]
    return DataLoader(dataset, batch_size=batch_size, sampler=items, **_settings(workers, timeout_s, pin_memory))


test_loader.__test__ = False  # type: ignore[attr-defined]  # not a pytest test


def _settings(workers: int, timeout_s: float, pin_memory: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "num_workers": workers,
        "collate_fn": collate,
        "pin_memory": pin_memory,
        "worker_init_fn": _init_worker,
        # Its own generator: an iterator's base seed would otherwise be drawn from the global one, and dropout would
        # depend on how often an epoch was begun.
        "generator": torch.Generator(),
    }
    if workers > 0:
        # DataLoader refuses these without workers.
        settings.update(persistent_workers=True, prefetch_factor=2, timeout=timeout_s)
    return settings


def _init_worker(worker: int) -> None:
    # As many threads as cores in each of as many workers as cores would only get in each other's way.
    torch.set_num_threads(1)
