"""Which frames make a clip."""

import numpy as np
import pytest

from atfr.data.sampling import random_clip, stride_at, uniform_views


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
    stride = stride_at(4, fps=fps, wanted_fps=30)
    (clip,) = uniform_views(1000, frames=8, stride=stride, views=1)
    for k, frame in enumerate(clip):
        times = (np.arange(1000) - clip[0]) / fps
        assert abs(times[frame] - 4 * k / 30) == pytest.approx(np.abs(times - 4 * k / 30).min())
    # The last start is the last one from which all of them fit.
    last = uniform_views(1000, frames=8, stride=stride, views=2)[1]
    assert last[-1] == 999 and (last - last[0]).tolist() == (clip - clip[0]).tolist()


def test_a_stride_stays_as_it_is_where_no_rate_is_wanted_or_known():
    assert stride_at(4, fps=None, wanted_fps=30) == stride_at(4, fps=10, wanted_fps=None) == stride_at(4, fps=30, wanted_fps=30) == 4


@pytest.mark.parametrize("name", ["num_frames", "frames", "stride", "views"])
def test_counts_below_one_are_refused_by_name(name):
    settings = {"num_frames": 10, "frames": 4, "stride": 2, "views": 3, name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0"):
        uniform_views(settings.pop("num_frames"), **settings)
