"""Which frames make a clip."""

from fractions import Fraction
from math import floor

import numpy as np
import pytest
from video_files import numbers, write_video

from atfr.data.clips import ClipSettings, TestClips, TrainClips
from atfr.data.temporal_sampling import (
    random_clip,
    random_clip_by_time,
    random_segments,
    segment_views,
    stride_at_rate,
    uniform_views,
    uniform_views_by_time,
)
from atfr.data.types import Video


@pytest.mark.parametrize("num_frames, frames, stride", [(100, 16, 4), (61, 16, 4), (62, 16, 4), (8, 8, 1), (300, 1, 7)])
def test_random_clips_keep_their_stride_and_reach_every_start(num_frames, frames, stride):
    rng = np.random.default_rng(0)
    starts = set()
    for _ in range(3000):
        indices = random_clip(num_frames, frames=frames, stride=stride, rng=rng)
        assert indices.tolist() == [indices[0] + stride * k for k in range(frames)]
        assert 0 <= indices[0] and indices[-1] < num_frames
        starts.add(int(indices[0]))
    assert starts == set(range(num_frames - (frames - 1) * stride))


def test_a_short_video_is_read_from_its_start_and_its_last_frame_repeated():
    short = random_clip(10, frames=6, stride=3, rng=np.random.default_rng(0))
    assert short.tolist() == [0, 3, 6, 9, 9, 9]
    assert [view.tolist() for view in uniform_views(10, frames=6, stride=3, views=2)] == [[0, 3, 6, 9, 9, 9]] * 2
    assert uniform_views(1, frames=3, stride=2, views=1)[0].tolist() == [0, 0, 0]


def test_one_view_is_the_centre():
    assert uniform_views(21, frames=3, stride=2, views=1)[0].tolist() == [8, 10, 12]


def test_several_views_are_spread_from_the_first_start_to_the_last():
    views = uniform_views(100, frames=5, stride=5, views=4)  # a span of 21 frames, so the last start is 79
    assert [view[0] for view in views] == [0, 26, 53, 79]
    assert views[-1][-1] == 99


@pytest.mark.parametrize("fps", [10, 12, 24, 25, 29.97, 30, 60])
def test_at_a_wanted_rate_each_frame_is_the_one_nearest_to_its_time(fps):
    stride = stride_at_rate(4, fps=fps, wanted_fps=30)
    (clip,) = uniform_views(1000, frames=8, stride=stride, views=1)
    for k, frame in enumerate(clip):
        times = (np.arange(1000) - clip[0]) / fps
        assert abs(times[frame] - 4 * k / 30) == pytest.approx(np.abs(times - 4 * k / 30).min())
    # The last start is the last one from which all of them fit.
    last = uniform_views(1000, frames=8, stride=stride, views=2)[1]
    assert last[-1] == 999 and (last - last[0]).tolist() == (clip - clip[0]).tolist()


def test_a_stride_stays_as_it_is_where_no_rate_is_wanted_or_known():
    assert stride_at_rate(4, fps=None, wanted_fps=30) == stride_at_rate(4, fps=10, wanted_fps=None) == stride_at_rate(4, fps=30, wanted_fps=30) == 4


@pytest.mark.parametrize("name", ["num_frames", "frames", "stride", "views"])
def test_counts_below_one_are_refused_by_name(name):
    settings = {"num_frames": 10, "frames": 4, "stride": 2, "views": 3, name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0"):
        uniform_views(settings.pop("num_frames"), **settings)


# ---- by time

TIMES = np.concatenate([np.arange(120) / 60, 2 + np.arange(50) / 5])  # 60 frames per second, then 5


def nearest(start, *, frames, interval, times=TIMES):
    """The later one of two frames that are equally near."""
    return [len(times) - 1 - int(np.abs(times[::-1] - (start + k * interval)).argmin()) for k in range(frames)]


def test_clips_by_time_span_the_same_time_wherever_they_lie_and_start_at_any_time():
    rng, starts = np.random.default_rng(0), []
    draws = np.random.default_rng(0)
    for _ in range(2000):
        clip = random_clip_by_time(TIMES, frames=16, interval=1 / 15, rng=rng)
        starts.append(draws.random() * (TIMES[-1] - 1))
        assert clip.dtype == np.int64 and clip.tolist() == nearest(starts[-1], frames=16, interval=1 / 15)
        assert TIMES[clip[-1]] - TIMES[clip[0]] == pytest.approx(1, abs=0.2)
    assert np.mean(np.array(starts) < 2) == pytest.approx(2 / (TIMES[-1] - 1), abs=0.03)  # a share of the time, not of the frames


def test_views_by_time_are_spread_evenly_in_time_and_one_is_the_centre():
    last = TIMES[-1] - 7 * 0.1
    views = uniform_views_by_time(TIMES, frames=8, interval=0.1, views=4)
    assert [view.tolist() for view in views] == [nearest(last * part / 3, frames=8, interval=0.1) for part in range(4)]
    (centre,) = uniform_views_by_time(TIMES, frames=8, interval=0.1, views=1)
    assert centre.tolist() == nearest(last / 2, frames=8, interval=0.1)


def test_by_time_a_short_video_is_read_from_its_start_and_its_last_frame_repeated():
    times = np.array([5.0, 5.1, 5.4, 6.0])
    expected = [0, 2, 3, 3, 3]
    assert random_clip_by_time(times, frames=5, interval=0.5, rng=np.random.default_rng(0)).tolist() == expected
    assert [view.tolist() for view in uniform_views_by_time(times, frames=5, interval=0.5, views=2)] == [expected] * 2
    assert uniform_views_by_time(times[:1], frames=2, interval=0.5, views=1)[0].tolist() == [0, 0]


@pytest.mark.parametrize("settings, message", [({"frames": 0}, "frames is 0"), ({"interval": 0}, "interval is 0")])
def test_what_makes_no_clip_by_time_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        uniform_views_by_time(TIMES, **{"frames": 4, "interval": 0.1, "views": 2, **settings})


# ---- segments


@pytest.mark.parametrize("num_frames,frames", [(40, 8), (37, 8), (8, 8), (5, 8), (1, 3), (100, 1)])
def test_a_random_frame_of_each_segment_is_any_of_its_frames_as_often_as_it_lies_in_it(num_frames, frames):
    rng, draws = np.random.default_rng(0), 4000
    counts = np.zeros((frames, num_frames))
    for _ in range(draws):
        clip = random_segments(num_frames, frames=frames, rng=rng)
        assert clip.dtype == np.int64 and (np.diff(clip) >= 0).all()
        counts[np.arange(frames), clip] += 1
    for segment in range(frames):
        first, last = Fraction(segment * num_frames, frames), Fraction((segment + 1) * num_frames, frames)
        for frame in range(num_frames):
            shared = max(Fraction(0), min(last, frame + 1) - max(first, frame)) / (last - first)
            assert counts[segment, frame] / draws == pytest.approx(float(shared), abs=0.04)
            assert (counts[segment, frame] > 0) == (shared > 0)


@pytest.mark.parametrize("num_frames,frames,views", [(40, 8, 1), (37, 8, 3), (300, 16, 10), (5, 8, 2), (1, 4, 3), (24, 8, 3)])
def test_views_of_segments_are_those_of_a_loop_over_them(num_frames, frames, views):
    found = segment_views(num_frames, frames=frames, views=views)
    assert len(found) == views
    for view, clip in enumerate(found):
        length = Fraction(num_frames, frames)
        expected = [floor(segment * length + length * (2 * view + 1) / (2 * views)) for segment in range(frames)]
        assert clip.tolist() == expected


def test_one_view_of_segments_has_their_centres_and_several_share_no_frame_where_there_are_enough():
    assert segment_views(20, frames=4, views=1)[0].tolist() == [2, 7, 12, 17]
    views = segment_views(24, frames=8, views=3)
    assert sorted(frame for view in views for frame in view.tolist()) == list(range(24))


@pytest.mark.parametrize("name", ["num_frames", "frames", "views"])
def test_counts_of_segments_below_one_are_refused_by_name(name):
    settings = {"num_frames": 10, "frames": 4, "views": 3, name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0"):
        segment_views(settings.pop("num_frames"), **settings)


def test_datasets_read_segments_when_told_to(tmp_path):
    videos = [Video(write_video(tmp_path / "a.avi", 40), 0)]
    sizes = {"crop_size": 24, "train_short_side": [24, 24], "test_short_side": 24, "mean": [0.5] * 3, "std": [0.2] * 3}
    clip = ClipSettings(frames=4, stride=30, sampling="segments", **sizes)

    def shown(item):
        return numbers(item.clip.permute(1, 0, 2, 3).numpy())

    tests = TestClips(videos, clip, views=2, crops=1)
    assert [shown(tests[view]) for view in (0, 1)] == [[2, 12, 22, 32], [7, 17, 27, 37]]
    train = TrainClips(videos, clip, seed=0)
    drawn = [shown(train[(epoch, 0)]) for epoch in range(6)]
    assert drawn == [shown(train[(epoch, 0)]) for epoch in range(6)] and len(set(map(tuple, drawn))) == 6
    assert all([frame // 10 for frame in clip] == [0, 1, 2, 3] for clip in drawn)
