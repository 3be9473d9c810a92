"""Which frames make a clip."""

import numpy as np
import pytest

from atfr.data.sampling import random_clip, uniform_views


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


@pytest.mark.parametrize("name", ["num_frames", "frames", "stride", "views"])
def test_counts_below_one_are_refused_by_name(name):
    settings = {"num_frames": 10, "frames": 4, "stride": 2, "views": 3, name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0"):
        uniform_views(settings.pop("num_frames"), **settings)
