"""Who reads what: the sampler's order over ranks and resumes, and the test split over processes."""

import itertools
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
from torch.utils.data import Dataset
from video_files import write_video

from atfr.data.clips import ClipSettings, TestClips
from atfr.data.loader import TrainSampler, test_loader
from atfr.data.types import Video


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("size", [6, 20, 25])
def test_the_ranks_together_read_what_one_process_would(size, world):
    for epoch in range(3):
        batches = {}
        for rank, of in [(0, 1), *((rank, world) for rank in range(world))]:
            sampler = TrainSampler(size, seed=1, global_batch=6, rank=rank, world=of)
            sampler.set_epoch(epoch)
            batches[rank, of] = list(sampler)
            assert len(batches[rank, of]) == len(sampler) == size // 6
        for number, whole in enumerate(batches[0, 1]):
            shares = [batches[rank, world][number] for rank in range(world)]
            assert sorted(sum(shares, [])) == sorted(whole)
            assert {len(share) for share in shares} == {6 // world}
        seen = [index for batch in batches[0, 1] for _, index in batch]
        assert len(set(seen)) == len(seen) == size // 6 * 6


def test_the_order_depends_on_seed_and_epoch():
    def order(seed, epoch):
        sampler = TrainSampler(50, seed=seed, global_batch=10)
        sampler.set_epoch(epoch)
        return [index for batch in sampler for _, index in batch]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) and order(0, 0) != order(1, 0)


@pytest.mark.parametrize("labels", [None, [0] * 12 + [1] * 5])
@pytest.mark.parametrize("step", [0, 3, 4, 5, 11])
def test_a_resume_goes_on_with_the_very_next_batch(step, labels):
    def batches_from(first):
        sampler = TrainSampler(17, seed=5, global_batch=4, rank=1, world=2, labels=labels)
        batches = []
        for epoch in range(first // 4, 3):  # 4 batches an epoch
            sampler.set_epoch(epoch, start_batch=first % 4 if epoch == first // 4 else 0)
            batches += list(sampler)
        return batches

    assert len(batches_from(0)) == 12
    assert batches_from(step) == batches_from(0)[step:]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_data_smaller_than_a_batch_goes_around_to_fill_one(world):
    ranks = [TrainSampler(3, seed=0, global_batch=8, rank=rank, world=world) for rank in range(world)]
    assert {len(sampler) for sampler in ranks} == {1}
    indices = sorted(index for sampler in ranks for batch in sampler for _, index in batch)
    assert len(set(indices)) == 8, "the same clip twice"
    assert sorted(np.bincount([index % 3 for index in indices])) == [2, 3, 3]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("videos, batch", [([50, 10, 4], 8), ([5, 5, 5, 5], 4), ([1, 30], 10), ([2, 1], 8)])
def test_a_balanced_epoch_has_every_class_and_within_it_every_video_equally_often(videos, batch, world):
    labels = [7 * label for label, count in enumerate(videos) for _ in range(count)]  # some classes have no videos
    total = max(1, len(labels) // batch) * batch
    orders = set()
    for epoch in range(4):
        indices = []
        for rank in range(world):
            sampler = TrainSampler(len(labels), seed=2, global_batch=batch, rank=rank, world=world, labels=labels)
            sampler.set_epoch(epoch)
            share = [index for part in sampler for _, index in part]
            assert len(share) == total // world
            assert all(len(part) == batch // world for part in sampler)
            indices += share
        assert len(set(indices)) == len(indices), "the same clip twice"
        times = np.bincount([index % len(labels) for index in indices], minlength=len(labels))
        by_class = [times[[at for at, label in enumerate(labels) if label == 7 * c]] for c in range(len(videos))]
        assert sorted(part.sum() for part in by_class) == sorted((total + c) // len(videos) for c in range(len(videos)))
        assert all(part.max() - part.min() <= 1 for part in by_class)
        orders.add(tuple(indices))
    assert len(orders) == 4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"global_batch": 2, "world": 3}, "trainer.batch_size=2 is the global batch, too small for 3 rank"),
        ({"global_batch": 0}, "trainer.batch_size=0"),
        ({"size": 0}, "there are 0 training videos"),
        ({"rank": 1}, "rank is 1"),
        ({"labels": [0, 1]}, "there are 2 labels for 10 training videos"),
    ],
)
def test_a_sampler_refuses_what_cannot_be_shared_out(changes, message):
    options = {"size": 10, "seed": 0, "global_batch": 4, **changes}
    with pytest.raises(ValueError, match=message):
        TrainSampler(options.pop("size"), **options)
    with pytest.raises(ValueError, match="start_batch is 2, the epoch has 2 batches"):
        TrainSampler(10, seed=0, global_batch=4).set_epoch(0, start_batch=2)


@pytest.mark.parametrize("world, workers", [(1, 0), (2, 0), (3, 0), (5, 0), (40, 0), (2, 1)])
def test_every_view_is_tested_exactly_once_for_any_number_of_processes(tmp_path, world, workers):
    videos = [Video(write_video(tmp_path / f"{label}.avi", 10), label) for label in range(3)]
    half = [0.5, 0.5, 0.5]
    clip = ClipSettings(
        frames=4, stride=2, crop_size=24, train_short_side=[24, 32], test_short_side=32, mean=half, std=half
    )
    data = TestClips(videos, clip, views=2, crops=3)
    seen = []
    for rank in range(world):
        loader = test_loader(data, batch_size=4, rank=rank, world=world, workers=workers, timeout_s=60)
        seen += [pair for batch in loader for pair in zip(batch.videos.tolist(), batch.views.tolist())]
    assert sorted(seen) == list(itertools.product(range(3), range(6)))


@pytest.mark.parametrize(
    "message, parts",
    [
        (
            "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)",
            ("shared memory", "--shm-size", "trainer.workers=0", "about 0 MB"),
        ),
        ("received 0 items of ancdata", ("file descriptors", "ulimit -n", "trainer.workers=1")),
        ("unable to open shared memory object </torch_1_2_3> in read-write mode: Too many open files (24)", ("file descriptors",)),
    ],
)
def test_a_shortage_that_ends_a_worker_is_said_in_one_line_with_the_way_out(tmp_path, monkeypatch, message, parts):
    half = [0.5, 0.5, 0.5]
    clip = ClipSettings(frames=4, stride=2, crop_size=24, train_short_side=[24, 32], test_short_side=32, mean=half, std=half)
    data = TestClips([Video("a.avi", 0)], clip, views=1, crops=1)

    def fail(self, item):
        raise RuntimeError(message)

    monkeypatch.setattr(TestClips, "__getitem__", fail)
    before = multiprocessing.active_children()
    with pytest.raises(OSError) as caught:
        list(test_loader(data, batch_size=1, workers=1, timeout_s=30))
    assert multiprocessing.active_children() == before, "a worker is left"
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value)
    with pytest.raises(RuntimeError):
        list(test_loader(data, batch_size=1, workers=0))


class Killed(Dataset):
    """Clips that a worker dies over as if its shared memory were full."""

    clip = ClipSettings(frames=4, stride=2, crop_size=24, train_short_side=[24, 32], test_short_side=32, mean=[0.5] * 3, std=[0.5] * 3)

    def __len__(self):
        return 1

    def __getitem__(self, item):
        os.kill(os.getpid(), signal.SIGBUS)


def test_a_worker_that_dies_of_a_bus_error_is_a_shortage_of_shared_memory():
    with pytest.raises(OSError, match="ran out of shared memory"):
        list(test_loader(Killed(), batch_size=1, workers=1, timeout_s=30))


def test_shared_memory_that_is_full_before_the_workers_start_is_said_too(monkeypatch):
    def full(self):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)")

    monkeypatch.setattr("torch.Tensor.share_memory_", full)
    with pytest.raises(OSError, match="ran out of shared memory"):
        test_loader(Stuck(), batch_size=1, workers=1)


class Stuck(Dataset):
    """A file system that does not answer."""

    def __len__(self):
        return 1

    def __getitem__(self, item):
        time.sleep(1.5)


def test_a_worker_that_takes_too_long_is_an_error():
    with pytest.raises(RuntimeError, match="timed out after 0.3 seconds"):
        list(test_loader(Stuck(), batch_size=1, workers=1, timeout_s=0.3))
