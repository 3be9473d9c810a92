"""Clips as datasets: what is random and what is not, bad videos, crops, and batches."""

import itertools

import numpy as np
import pytest
import torch
from small_clips import SETTINGS, settings
from torchvision.transforms.v2 import functional as F
from video_files import numbers, write_at, write_jpgs, write_video

from atfr.data import warn_once
from atfr.data.clips import TestClips, TrainClips, collate
from atfr.data.loader import TrainSampler, test_loader, train_loader
from atfr.data.transforms import Normalizer, TrainTransform, test_crops
from atfr.data.types import Video, VideoError


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Six videos of 10 to 60 frames and different sizes, labelled 0 to 5."""
    folder = tmp_path_factory.mktemp("videos")
    sizes = [(64, 48), (48, 64), (80, 48), (64, 64), (50, 40), (120, 48)]
    return [
        Video(write_video(folder / f"{label}.avi", 10 * (label + 1), size=size), label)
        for label, size in enumerate(sizes)
    ]


@pytest.fixture
def broken(tmp_path):
    path = tmp_path / "broken.mp4"
    path.write_text("no video")
    return Video(str(path), 1)


# ---- settings


@pytest.mark.parametrize(
    "field, wrong",
    [
        ("frames", 0), ("fps", 0), ("flip", 1.5), ("crops", 2), ("sampling", "all"), ("decoder", "opencv"), ("mean", [0.5]), ("std", [0.1, 0.0, 0.1]),
        ("train_short_side", [32, 24]), ("train_short_side", [16, 24]), ("train_scale", [0.0, 1.0]), ("test_short_side", 16),
        ("randaugment", [2]), ("randaugment", [0, 9]), ("randaugment", [2, 31]), ("color_jitter", [0.4]), ("color_jitter", [0, 0, 0, 0.6]), ("erasing", 1.1),
    ],
)  # fmt: skip
def test_settings_that_are_out_of_range_are_refused_by_name(field, wrong):
    with pytest.raises(ValueError, match=rf"^dataset\.clip\.{field} is .*, it must be "):
        settings(**{field: wrong})


# ---- training clips


def epoch_of(videos, *, workers, epochs=(0,), seed=3, **changes):
    data = TrainClips(videos, settings(**changes), seed=seed)
    sampler = TrainSampler(len(videos), seed=seed, global_batch=2)
    loader = train_loader(data, sampler=sampler, workers=workers, timeout_s=60 if workers else 0)
    batches = []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        batches += list(loader)
    return batches


def same(left, right):
    return all(
        torch.equal(a.clips, b.clips) and torch.equal(a.videos, b.videos) and a.bad == b.bad
        for a, b in zip(left, right, strict=True)
    )


def test_the_number_of_workers_changes_nothing(videos, broken):
    some = [*videos[:3], broken, *videos[3:]]
    alone = epoch_of(some, workers=0, epochs=(0, 1))
    assert len(alone) == 6 and sum(len(batch.bad) for batch in alone) > 0
    assert same(alone, epoch_of(some, workers=2, epochs=(0, 1)))


def test_seed_and_epoch_change_the_clips_and_the_global_generator_is_left_alone(videos):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = epoch_of(videos, workers=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(first, epoch_of(videos, workers=0))
    assert not same(first, epoch_of(videos, workers=0, epochs=(1,)))
    assert not same(first, epoch_of(videos, workers=0, seed=4))


def test_a_clip_holds_consecutive_strided_frames_of_its_own_video(videos):
    data = TrainClips(videos, settings(), seed=0)
    for index, epoch in itertools.product(range(len(videos)), range(3)):
        item = data[(epoch, index)]
        assert (item.video, item.label, item.path, item.bad) == (index, index, videos[index].path, ())
        assert item.clip.shape == (3, 4, 24, 24) and item.clip.dtype == torch.uint8 and item.clip.is_contiguous()
        found = numbers(item.clip.permute(1, 0, 2, 3).numpy())
        assert found == [found[0] + 2 * k for k in range(4)] and found[-1] < 10 * (index + 1)


def test_at_a_wanted_rate_the_stride_follows_the_files_own(videos, tmp_path):
    frames = np.stack([np.full((48, 64, 3), 10 + 4 * k, dtype=np.uint8) for k in range(40)])
    folder = Video(write_jpgs(tmp_path / "folder", frames), 0)
    wanted = {"frames": 4, "stride": 1, "fps": 5}  # the videos have 10 frames a second
    for video, options, step in (
        (videos[5], {}, 2),
        (videos[5], {"fps": 20, "stride": 4}, 2),
        (folder, {}, 1),
        (folder, {"fallback_fps": 15}, 3),
    ):
        chosen = settings(**{**wanted, **options})
        for data, item in ((TrainClips([video], chosen, seed=0), (0, 0)), (TestClips([video], chosen, views=1, crops=1), 0)):
            found = numbers(data[item].clip.permute(1, 0, 2, 3).numpy())
            assert found == [found[0] + step * k for k in range(4)]


def test_an_index_past_the_end_is_another_clip_of_the_same_video(videos):
    data = TrainClips(videos, settings(), seed=0)
    first, second = data[(0, 5)], data[(0, 5 + len(videos))]
    assert first.video == second.video == 5
    assert not torch.equal(first.clip, second.clip)


def test_a_bad_training_video_is_replaced_the_same_way_each_time_and_reported(videos, broken):
    data = TrainClips([broken, *videos], settings(), seed=0)
    item, again = data[(0, 0)], data[(0, 0)]
    assert item.video == again.video != 0 and torch.equal(item.clip, again.clip)
    assert item.label == data.videos[item.video].label and item.path == data.videos[item.video].path
    assert all(message.startswith(f"cannot read {broken.path}: Invalid data") for message in item.bad)
    assert 1 <= len(item.bad) < 10
    assert len({data[(epoch, 0)].video for epoch in range(12)}) > 1, "always the same stand-in"


@pytest.mark.parametrize("workers", [0, 1])
def test_training_stops_when_ten_videos_in_a_row_are_bad(broken, workers):
    with pytest.raises(VideoError, match=r"the last of 10 training videos") as caught:
        epoch_of([broken] * 3, workers=workers)
    assert caught.value.path == broken.path


def test_no_training_videos_are_refused():
    with pytest.raises(ValueError, match="no training videos"):
        TrainClips([], settings(), seed=0)


# ---- transforms


def positions(frames, height, width):
    """uint8 [T, 3, H, W]: channel 0 holds the row, channel 1 the column, channel 2 the frame."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.stack([rows, columns, torch.full_like(rows, t)]) for t in range(frames)]).to(torch.uint8)


def test_a_plain_crop_cuts_the_same_square_out_of_every_frame_anywhere_and_flips_half_of_them():
    clip = positions(3, 30, 40)
    transform = TrainTransform(crop_size=24, short_side=(30, 30), flip=0.5)
    seen, flips = set(), 0
    for seed in range(400):
        cut = transform(clip, short_side=30, rng=np.random.default_rng(seed))
        assert cut.shape == (3, 3, 24, 24)
        flipped = bool(cut[1, 0, 0, 0] > cut[1, 0, 0, 1])
        flips += flipped
        cut = cut.flip(-1) if flipped else cut
        top, left = int(cut[0, 0, 0, 0]), int(cut[1, 0, 0, 0])
        assert torch.equal(cut, clip[..., top : top + 24, left : left + 24].transpose(0, 1))
        seen.add((top, left))
    assert {top for top, _ in seen} == set(range(7)) and {left for _, left in seen} == set(range(17))
    assert 160 < flips < 240


def test_the_short_side_is_drawn_from_the_whole_range():
    transform = TrainTransform(crop_size=24, short_side=(30, 33))
    drawn = {transform.draw_short_side(np.random.default_rng(seed)) for seed in range(60)}
    assert drawn == {30, 31, 32, 33}
    # A video smaller than that is enlarged.
    assert transform(positions(2, 10, 20), short_side=30, rng=np.random.default_rng(0)).shape == (3, 2, 24, 24)


def test_a_resized_crop_covers_the_area_asked_for_and_is_the_same_in_all_frames():
    clip = positions(2, 100, 160)
    transform = TrainTransform(crop_size=25, short_side=(100, 100), scale=(0.2, 0.6), flip=0.0)
    shares = []
    for seed in range(100):
        cut = transform(clip, short_side=100, rng=np.random.default_rng(seed)).float()
        assert cut.shape == (3, 2, 25, 25) and torch.equal(cut[:2, 0], cut[:2, 1])
        height, width = (cut[0, 0, -1, 0] - cut[0, 0, 0, 0]) / 24 * 25, (cut[1, 0, 0, -1] - cut[1, 0, 0, 0]) / 24 * 25
        shares.append(float(height * width) / 16000)
        assert 0.65 < float(width / height) < 1.45
    assert 0.17 < min(shares) < 0.28 and 0.5 < max(shares) < 0.66


def test_three_test_crops_run_along_the_longer_side():
    wide, tall = positions(2, 30, 50), positions(2, 50, 30)
    corners = [crop[:2, 0, 0, 0].tolist() for crop in test_crops(wide, short_side=30, crop_size=20, crops=3)]
    assert corners == [[5, 0], [5, 15], [5, 30]]
    corners = [crop[:2, 0, 0, 0].tolist() for crop in test_crops(tall, short_side=30, crop_size=20, crops=3)]
    assert corners == [[0, 5], [15, 5], [30, 5]]
    centre, square = test_crops(wide, short_side=30, crop_size=20, crops=1), wide[..., 5:25, 15:35].transpose(0, 1)
    assert len(centre) == 1 and torch.equal(centre[0], square)


def test_the_normalizer_agrees_with_torchvision_and_adds_nothing_to_a_checkpoint():
    clips = torch.randint(0, 256, (2, 3, 4, 5, 6), dtype=torch.uint8)
    normalizer = Normalizer(SETTINGS["mean"], SETTINGS["std"])
    frames = F.to_dtype(clips.transpose(1, 2), torch.float32, scale=True)
    expected = F.normalize(frames, SETTINGS["mean"], SETTINGS["std"]).transpose(1, 2)
    assert normalizer(clips).dtype == torch.float32
    torch.testing.assert_close(normalizer(clips), expected, rtol=1e-5, atol=1e-5)
    assert normalizer.state_dict() == {}


# ---- test clips and batches


def test_test_clips_are_every_view_and_crop_in_order(videos):
    data = TestClips(videos, settings(), views=2, crops=3)
    assert len(data) == 6 * 2 * 3
    items = [data[item] for item in range(len(data))]
    assert [(item.video, item.view) for item in items] == list(itertools.product(range(6), range(6)))
    assert all(item.label == item.video and item.error is None and item.clip.shape == (3, 4, 24, 24) for item in items)
    last = items[-1]  # 60 frames, a span of 7: the second view starts at frame 53
    assert numbers(last.clip.permute(1, 0, 2, 3).numpy()) == [53, 55, 57, 59]
    # In another order nothing is different.
    fresh = TestClips(videos, settings(), views=2, crops=3)
    for item in (35, 0, 17, 16, 3, 34):
        assert torch.equal(fresh[item].clip, items[item].clip)


def test_a_bad_test_video_is_reported_and_never_replaced(videos, broken):
    data = TestClips([videos[0], broken], settings(), views=1, crops=3)
    (batch,) = test_loader(data, batch_size=6)
    assert batch.videos.tolist() == [0, 0, 0] and batch.views.tolist() == [0, 1, 2] and len(batch) == 3
    assert [(failed.video, failed.path) for failed in batch.failed] == [(1, broken.path)] * 3
    assert all("Invalid data" in failed.reason for failed in batch.failed)
    nothing = collate([data[3]])
    assert nothing.clips is None and len(nothing) == 0 and nothing.labels.dtype == torch.int64
    assert nothing.failed == batch.failed[:1]


# ---- decoded clips kept on disk


def everything(videos, cache, epoch=0):
    train, test = TrainClips(videos, settings(cache=cache), seed=1), TestClips(videos, settings(cache=cache), views=2, crops=1)
    return [train[epoch, index].clip for index in range(len(videos))] + [test[item].clip for item in range(len(test))]


def test_clips_from_the_cache_are_those_that_were_decoded(videos, tmp_path, monkeypatch):
    plain = everything(videos, None)
    assert all(torch.equal(a, b) for a, b in zip(plain, everything(videos, str(tmp_path))))

    def refuse(*_, **__):
        raise AssertionError("decoded")

    monkeypatch.setattr("atfr.data.clips.read_clip", refuse)
    again = everything(videos, str(tmp_path))
    assert len(again) == 18 and all(torch.equal(a, b) for a, b in zip(plain, again))
    with pytest.raises(AssertionError, match="decoded"):  # other clips of the same videos are not taken for these
        everything(videos, str(tmp_path), epoch=1)


def test_a_video_that_changed_is_decoded_again(tmp_path):
    video = Video(write_video(tmp_path / "a.avi", 10, size=(64, 48)), 0)
    first = everything([video], str(tmp_path / "cache"))
    write_video(tmp_path / "a.avi", 30, size=(64, 64))
    second = everything([video], str(tmp_path / "cache"))
    assert all(torch.equal(a, b) for a, b in zip(second, everything([video], None)))
    assert not torch.equal(first[-1], second[-1])


def test_what_cannot_be_read_is_not_kept(broken, tmp_path):
    for _ in range(2):
        assert TestClips([broken], settings(cache=str(tmp_path / "cache")), views=1, crops=1)[0].error
    assert not (tmp_path / "cache").exists()


def test_a_cache_may_lie_in_the_home_folder(videos, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert TestClips(videos[:1], settings(cache="~/cache"), views=1, crops=1)[0].clip is not None
    assert list((tmp_path / "home/cache").rglob("*.npz"))


# ---- a wanted rate


def test_at_a_wanted_rate_clips_span_the_same_time_wherever_they_lie_in_a_file_of_a_variable_rate(tmp_path):
    times = [50 * k for k in range(20)] + [1000 + 250 * k for k in range(20)]  # 20 frames per second, then 4
    video = Video(write_at(tmp_path / "a.mp4", times), 0)
    clip = settings(frames=5, stride=1, fps=4)
    seen = [numbers(TestClips([video], clip, views=3, crops=1)[view].clip.permute(1, 0, 2, 3).numpy()) for view in range(3)]
    assert seen[0] == [0, 5, 10, 15, 20] and seen[2] == [35, 36, 37, 38, 39]
    train = TrainClips([video], clip, seed=0)
    for epoch in range(8):
        frames = numbers(train[epoch, 0].clip.permute(1, 0, 2, 3).numpy())
        assert times[frames[-1]] - times[frames[0]] == pytest.approx(1000, abs=126)


def test_a_wanted_rate_that_cannot_be_had_is_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(warn_once, "_given", set())
    frames = np.zeros((8, 48, 64, 3), np.uint8)
    folders = [Video(write_jpgs(tmp_path / name, frames), 0) for name in "ab"]
    for clip, warnings in ((settings(), 0), (settings(fps=30, fallback_fps=25), 0), (settings(fps=30), 1)):
        data = TestClips(folders, clip, views=1, crops=1)
        assert data[0].clip is not None and data[1].clip is not None
        assert len(caplog.records) == warnings
    message = caplog.records[0].getMessage()
    assert f"dataset.clip.fps=30 is ignored for {folders[0].path} and other videos of unknown frame rate" in message and "dataset.clip.fallback_fps" in message
