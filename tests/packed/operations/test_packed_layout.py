"""Where clips lie in a packed tensor: lengths and times behind a window, rows with gaps, and moved frames."""

from __future__ import annotations

import random

import pytest
import torch
from each_clip_alone import FORMATS, clips_of, segments_of
from torch import nn

from atfr.models.packed import ops
from atfr.models.packed.segments import Segments, Window, rows_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("window", [Window(3, padding=1), Window(5, padding=2), Window(3, 2, 1), Window(7, 4, 3), Window(3, padding=2, dilation=2), Window(2, 2)], ids=str)
def test_rows_hold_every_clip_once_with_its_gap_and_take_no_more_than_one_row_of_all(window):
    draw = random.Random(0)
    for _ in range(200):
        lengths = tuple(draw.randint(window.kernel - 2 * window.padding, 16) for _ in range(draw.randint(1, 12)))
        long, rows = rows_of(lengths, window)
        assert sorted(clip for clips in rows for clip, _ in clips) == list(range(len(lengths)))
        for clips in rows:
            for (clip, start), (_, following) in zip(clips, clips[1:]):
                assert following - (start + lengths[clip]) >= window.padding
                assert following // window.stride >= start // window.stride + window.out(lengths[clip])
            assert all(start % window.stride == 0 for _, start in clips)
            last, start = clips[-1]
            assert start + lengths[last] <= long
        one = 0  # the end of one row of all, longest first
        for length in sorted(lengths, reverse=True):
            begin = -(-one // window.stride) * window.stride
            one, end = begin + max(length + window.padding, (window.out(length) - 1) * window.stride + 1), begin + length
        assert len(rows) * long <= end
        assert len(lengths) == 1 or len(rows_of(lengths, window, True)[1]) > 1


WINDOWS = [Window(*w) for w in [(1,), (1, 2), (1, 3, 1), (3, 1, 1), (3, 2, 1), (2, 2), (2, 2, 1), (5, 4, 2), (7, 8, 3), (3, 1, 2), (3, 1, 2, 2), (3, 2, 0, 2), (4, 1, 0)]]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_segments_behind_a_window_have_its_lengths_and_the_times_of_its_centres(window):
    pool = nn.Conv1d(1, 1, window.kernel, window.stride, window.padding, window.dilation)
    lengths = (9, 5, 12, 6)
    times = torch.cat([torch.rand(length).cumsum(0) * 3 for length in lengths])
    behind = Segments(lengths, 12, times).after(window)
    assert behind.lengths == tuple(pool(torch.zeros(1, 1, length)).shape[2] for length in lengths)
    assert behind.frames == pool(torch.zeros(1, 1, 12)).shape[2]
    expected = []
    for clip, length in zip(times.split(lengths), behind.lengths):
        for i in range(length):
            first = i * window.stride - window.padding
            centre = first + window.dilation * (window.kernel - 1) // 2
            expected.append(clip[min(max(centre, 0), len(clip) - 1)].item() / window.stride)
    assert behind.times.tolist() == pytest.approx(expected)


def test_segments_know_which_clip_a_feature_belongs_to():
    segments = segments_of((3, 1, 2))
    assert segments.owner.tolist() == [0, 0, 0, 1, 2, 2]
    assert segments.padded.tolist() == [[0, 1, 2], [3, 0, 0], [4, 5, 0]]
    assert segments.counts.tolist() == [3, 1, 2]
    assert ops.unpadded((3, 1, 2), CPU).tolist() == [0, 1, 2, 3, 6, 7]
    whole = Segments.whole(2, 3, CPU)
    assert whole.lengths == (3, 3) and whole.frames == 3 and whole.times.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("run", [ops.conv3d, ops.max_pool, ops.avg_pool])
def test_lengths_that_do_not_add_up_are_refused(run):
    with pytest.raises(AssertionError, match="packed length 5 is not 6, the sum of"):
        run(nn.Conv3d(4, 4, 3), clips_of((5,)), segments_of((3, 3)))


@pytest.mark.parametrize("memory", FORMATS)
def test_moving_frames_keeps_the_memory_format(memory):
    clips = torch.randn(3, 4, 5, 2, 2).contiguous(memory_format=FORMATS[memory])
    x = ops.pack(clips)
    assert x.equal(torch.cat(list(clips), dim=1)[None])
    x = x.contiguous(memory_format=FORMATS[memory])
    places = torch.tensor([14, 0, 0, 7])
    taken = ops.take(x, places)
    assert taken.equal(x[:, :, places]) and taken.is_contiguous(memory_format=FORMATS[memory])
