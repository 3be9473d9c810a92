"""Distribute clips over ranks, and build the DataLoaders that read them."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from atfr.data.clips import Batch, TestClips, TrainClips, collate
from atfr.data.shortage import explain_shortage
from atfr.data.types import ClipBatch, EvalBatch
from atfr.data.video.timeout import TimeLimit
from atfr.data.worker_signals import ignore_main_signals, main_signals_blocked
from atfr.utils.malloc import return_freed_memory

_PREFETCH = 2  # batches that each worker has ready

Clips = TypeVar("Clips", TrainClips, TestClips)


class TrainSampler(Sampler[list[tuple[int, int]]]):
    """Yield batches of (epoch, index) for one rank; the batch_sampler of a DataLoader.

    The order depends only on the seed and the epoch. The k-th global batch is `permutation[k * G : (k + 1) * G]`, and
    rank r reads every world-th clip of it from the r-th on. If `world` does not divide G, the last ranks read one clip
    less. The last partial batch of an epoch is dropped. With fewer videos than G, an epoch is one batch that repeats
    the permutation; each repetition adds `size` to the indices, so that TrainClips cuts other clips.

    With `labels`, the class of each video, `balanced_order` replaces the permutation.

    Call `set_epoch` before each epoch; a resume starts within one. The index holds the epoch, so workers may be
    persistent.
    """

    def __init__(
        self, size: int, *, seed: int, global_batch: int, rank: int = 0, world: int = 1, labels: Sequence[int] | None = None
    ) -> None:
        if size < 1:
            raise ValueError(f"there are {size} training videos, at least 1 is needed")
        if global_batch < world:
            raise ValueError(f"trainer.batch_size={global_batch} is the global batch, too small for {world} rank(s): each needs at least one clip")
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
        """Return the number of batches in a whole epoch."""
        return max(1, self.size // self.global_batch)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Set the epoch of the next iteration, and the batch that it starts from."""
        if not 0 <= start_batch < len(self):
            raise ValueError(f"start_batch is {start_batch}, the epoch has {len(self)} batches")
        self.epoch = epoch
        self.start_batch = start_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # Read now: a DataLoader prefetches, and set_epoch may be called before it has finished.
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
    """Return `count` indices, int64, in random order, with equally many of each class in `labels` [videos].

    If the number of classes does not divide `count`, randomly chosen classes get one index more; likewise the videos
    within a class. Each repetition of a video adds the number of videos to its index.
    """
    classes = rng.permutation(np.unique(labels))
    counts = count // len(classes) + (np.arange(len(classes)) < count % len(classes))
    parts = [
        _repeated(rng.permutation(np.flatnonzero(labels == label)), number, size=len(labels)) for label, number in zip(classes, counts)
    ]
    return rng.permutation(np.concatenate(parts))


def _repeated(order: np.ndarray, count: int, *, size: int) -> np.ndarray:
    """Return the first `count` indices of `order`, repeated if needed; each repetition adds `size` to them."""
    repetition, position = np.divmod(np.arange(count), len(order))
    return order[position] + repetition * size


class ClipLoader(DataLoader):
    """DataLoader whose errors name the file that a worker hung or died on, or the exhausted resource.

    Iteration raises TimeoutError, ChildProcessError or OSError.
    """

    def __iter__(self) -> Iterator[Batch]:
        try:
            with main_signals_blocked():
                batches = super().__iter__()
            yield from self._again_after_suspension(batches)
        except (RuntimeError, OSError) as error:
            short = explain_shortage(error, workers=self.num_workers, needed=self._shared_bytes) if self.num_workers else None
            if short:
                self._end_workers()
                raise OSError(short) from error
            reads = self.dataset.limit.current_reads()
            if "timed out" not in str(error):  # a worker that hangs in a read would be waited for
                self._end_workers()
            if not str(error).startswith("DataLoader") or not reads:
                raise
            files = [f"{self.dataset.videos[number].path} ({seconds:.0f} s so far)" for number, seconds in reads]
            if "timed out" in str(error):
                raise TimeoutError(
                    f"no batch within {self.timeout:g} s; the longest read is that of {files[0]}: leave the file out if it hangs,"
                    " or raise trainer.timeout_s if files are slow"
                ) from error
            raise ChildProcessError(f"{' '.join(str(error).split())}; its workers were reading {', '.join(files)}") from error

    def _again_after_suspension(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches; wait again after a timeout that took much longer than its limit, because the job was suspended meanwhile."""
        while True:
            began = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if "timed out" not in str(error) or time.monotonic() - began < 1.5 * self.timeout:
                    raise
            else:
                yield batch

    def _end_workers(self) -> None:
        """End the workers now: otherwise a later garbage collection ends them, and waits for them for five seconds wherever it happens."""
        batches, self._iterator = getattr(self, "_iterator", None), None
        if batches is not None:
            batches._shutdown_workers()

    def _shared_bytes(self) -> int:
        """Return the bytes of the prefetched batches and the one in use."""
        clip, sampler = self.dataset.clip, self.batch_sampler
        clips = -(-sampler.global_batch // sampler.world) if isinstance(sampler, TrainSampler) else self.batch_size
        return (self.num_workers * _PREFETCH + 1) * clips * 3 * clip.frames * clip.crop_size**2


def train_loader(
    dataset: TrainClips, *, sampler: TrainSampler, workers: int = 0, timeout_s: float = 0.0, pin_memory: bool = False
) -> DataLoader[ClipBatch]:
    """Load batches of TrainClips in the order of `sampler`, which also sets the batch size of this rank.

    A batch of a worker, or without workers a single read, may take `timeout_s` seconds (0: no limit). Then iteration
    raises TimeoutError, which names the file.
    """
    return ClipLoader(with_time_limit(dataset, workers=workers, timeout_s=timeout_s), batch_sampler=sampler, **_settings(workers, timeout_s, pin_memory))


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
    """Load every world-th item of TestClips from the rank-th on, so that all ranks together load each item once.

    `batch_size` is per rank. Ranks may differ by one item or have none, so do not synchronize them inside the loop.
    `timeout_s` as in `train_loader`.
    """
    if batch_size < 1:
        raise ValueError(f"the batch size per rank is {batch_size}, it must be at least 1")
    if not 0 <= rank < world:
        raise ValueError(f"rank is {rank}, it must be in [0, {world})")
    items = range(rank, len(dataset), world)
    limited = with_time_limit(dataset, workers=workers, timeout_s=timeout_s)
    return ClipLoader(limited, batch_size=batch_size, sampler=items, **_settings(workers, timeout_s, pin_memory))


test_loader.__test__ = False  # type: ignore[attr-defined]  # not a pytest test


def with_time_limit(dataset: Clips, *, workers: int = 0, timeout_s: float) -> Clips:
    """Return a copy of the dataset that limits how long reads may take."""
    limited = copy.copy(dataset)
    try:
        limited.limit = TimeLimit(timeout_s, workers=workers)
    except RuntimeError as error:
        short = explain_shortage(error, workers=workers)
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
        # Otherwise each iterator would draw its base seed from the global generator, which dropout uses.
        "generator": torch.Generator(),
    }
    if workers > 0:
        settings.update(persistent_workers=True, prefetch_factor=_PREFETCH, timeout=timeout_s)
    return settings


def _init_worker(worker: int) -> None:
    ignore_main_signals()
    # Each worker would otherwise start a thread per core.
    torch.set_num_threads(1)
    return_freed_memory()
