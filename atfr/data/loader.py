"""Which process gets which clips, and the DataLoaders that read them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from atfr.data.clips import Batch, TestClips, TrainClips, collate
from atfr.data.shortage import shortage
from atfr.data.types import ClipBatch, EvalBatch
from atfr.data.video.timeout import TimeLimit
from atfr.data.worker_signals import leave_signals_to_main, starting_processes
from atfr.utils.malloc import hand_back_freed_memory

_PREFETCH = 2  # batches that each worker has ready

Clips = TypeVar("Clips", TrainClips, TestClips)


class TrainSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for one process, to be used as a DataLoader's batch_sampler.

    The order depends on the seed and the epoch alone: the k-th global batch of an epoch is
    `permutation[k * G : (k + 1) * G]`, of which process r of `world` takes every world-th, from the r-th on: where G
    does not divide, the last processes have one clip less. The last
    partial batch of an epoch is dropped. With fewer videos than G an epoch is one batch that goes around the
    permutation as often as needed; an index then grows by `size` a round, so that TrainClips cuts another clip.

    With `labels`, the class of each video, the order is `balanced_order`'s instead: every class equally often.

    `set_epoch` moves on, and in a resume to a place within an epoch. The epoch travels in the index, so workers may be
    persistent.
    """

    def __init__(
        self, size: int, *, seed: int, global_batch: int, rank: int = 0, world: int = 1, labels: Sequence[int] | None = None
    ) -> None:
        if size < 1:
            raise ValueError(f"there are {size} training videos, at least 1 is needed")
        if global_batch < world:
            raise ValueError(f"trainer.batch_size={global_batch} is the global batch, too small for {world} process(es): each of them needs a clip")
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank}, it must be in [0, {world})")
        if labels is not None and len(labels) != size:
            raise ValueError(f"there are {len(labels)} labels for {size} training videos")
        self.size = size
        self.seed = seed
        self.global_batch = global_batch
        self.rank = rank
        self.world = world
        self.labels = None if labels is None else np.asarray(labels)
        self.epoch, self.start_batch = 0, 0

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
        rng, count = np.random.default_rng((self.seed, epoch)), len(self) * self.global_batch
        if self.labels is None:
            order = _repeated(rng.permutation(self.size), count, size=self.size)
        else:
            order = balanced_order(self.labels, count, rng=rng)
        for batch in range(first, len(self)):
            chosen = order[batch * self.global_batch : (batch + 1) * self.global_batch]
            yield [(epoch, int(index)) for index in chosen[self.rank :: self.world]]


def balanced_order(labels: np.ndarray, count: int, *, rng: np.random.Generator) -> np.ndarray:
    """`count` indices, int64, in random order, in which every class of `labels` [videos] comes equally often.

    Where that does not divide, some classes, drawn anew each time, come once more than the others; likewise the videos
    within a class. A video that comes again has its index grown by the number of videos a round.
    """
    classes = rng.permutation(np.unique(labels))
    shares = count // len(classes) + (np.arange(len(classes)) < count % len(classes))
    parts = [
        _repeated(rng.permutation(np.flatnonzero(labels == label)), share, size=len(labels)) for label, share in zip(classes, shares)
    ]
    return rng.permutation(np.concatenate(parts))


def _repeated(order: np.ndarray, count: int, *, size: int) -> np.ndarray:
    """The first `count` of `order`, gone around as often as needed, with the indices grown by `size` a round."""
    turns, places = np.divmod(np.arange(count), len(order))
    return order[places] + turns * size


class ClipLoader(DataLoader):
    """DataLoader whose errors name the file a worker hung or died on, or the exhausted resource.

    Raises, from its iteration, TimeoutError, ChildProcessError or OSError.
    """

    def __iter__(self) -> Iterator[Batch]:
        try:
            with starting_processes():
                batches = super().__iter__()
            yield from batches
        except (RuntimeError, OSError) as error:
            short = shortage(error, workers=self.num_workers, needed=self._shared_bytes) if self.num_workers else None
            if short:
                raise OSError(short) from error
            reads = self.dataset.limit.under_way()
            if not str(error).startswith("DataLoader") or not reads:
                raise
            files = [f"{self.dataset.videos[number].path} ({seconds:.0f} s so far)" for number, seconds in reads]
            if "timed out" in str(error):
                raise TimeoutError(
                    f"no batch came within {self.timeout:g} s; the longest read is that of {files[0]}: if it hangs, leave the file"
                    " out, and if files are merely slow, raise trainer.timeout_s"
                ) from error
            raise ChildProcessError(f"{' '.join(str(error).split())}; the loader's processes were reading {', '.join(files)}") from error

    def _shared_bytes(self) -> int:
        """Bytes of the batches that lie ready, those being made, and the one in use."""
        clip, sampler = self.dataset.clip, self.batch_sampler
        clips = -(-sampler.global_batch // sampler.world) if isinstance(sampler, TrainSampler) else self.batch_size
        return (self.num_workers * _PREFETCH + 1) * clips * 3 * clip.frames * clip.crop_size**2


def train_loader(
    dataset: TrainClips, *, sampler: TrainSampler, workers: int = 0, timeout_s: float = 0.0, pin_memory: bool = False
) -> DataLoader[ClipBatch]:
    """Batches of TrainClips in the order of `sampler`, which also fixes their size in this process.

    A batch of a worker, or without workers a single read, that takes longer than `timeout_s` seconds (0: no limit)
    raises TimeoutError, which names the file.
    """
    return ClipLoader(_limited(dataset, workers, timeout_s), batch_sampler=sampler, **_settings(workers, timeout_s, pin_memory))


def test_loader(
    dataset: TestClips,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    timeout_s: float = 0.0,
    pin_memory: bool = False,
) -> DataLoader[EvalBatch]:
    """Every world-th item of TestClips from the rank-th on: over all processes each view comes exactly once.

    `batch_size` is per process. Processes may have one item more or less than others, or none, so nothing that waits
    for all of them belongs inside the loop. `timeout_s` as in `train_loader`.
    """
    if batch_size < 1:
        raise ValueError(f"the batch size of a process is {batch_size}, it must be at least 1")
    if not 0 <= rank < world:
        raise ValueError(f"rank is {rank}, it must be in [0, {world})")
    items = range(rank, len(dataset), world)
    limited = _limited(dataset, workers, timeout_s)
    return ClipLoader(limited, batch_size=batch_size, sampler=items, **_settings(workers, timeout_s, pin_memory))


test_loader.__test__ = False  # type: ignore[attr-defined]  # not a pytest test


def _limited(dataset: Clips, workers: int, timeout_s: float) -> Clips:
    """The dataset with a limit of its own on how long reads may take; the caller's is left as it is."""
    limited = copy.copy(dataset)
    try:
        limited.limit = TimeLimit(timeout_s, workers=workers)
    except RuntimeError as error:
        short = shortage(error, workers=workers)
        if short:
            raise OSError(short) from error
        raise
    return limited


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
        settings.update(persistent_workers=True, prefetch_factor=_PREFETCH, timeout=timeout_s)
    return settings


def _init_worker(worker: int) -> None:
    leave_signals_to_main()
    # As many threads as cores in each of as many workers as cores would only get in each other's way.
    torch.set_num_threads(1)
    hand_back_freed_memory()
