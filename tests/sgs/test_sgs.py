"""The anchor bins against a loop over frames, and what is refused; the rest is in test_sgs_family."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from atfr.models.sgs.functional import anchor_bins, calibrated_width, sampling_weights, uniform_bins

ANCHOR = dict(similarity="anchor", kernel="mean", scale="absolute", order="time")
ABSOLUTE = dict(scale="absolute", width=1.0)


def loop_anchor(z: torch.Tensor, width: float, num_bins: int) -> list[int]:
    groups = [[z[0]]]
    bins = [0]
    for frame in z[1:]:
        mean = torch.stack(groups[-1]).mean(0)
        if (frame - mean).square().mean().sqrt() > width and len(groups) < num_bins:
            groups.append([])
        groups[-1].append(frame)
        bins.append(len(groups) - 1)
    return bins


@pytest.mark.parametrize("num_bins", [1, 3, 12, 20])
@pytest.mark.parametrize("width", [0.2, 0.8, 1.3])
def test_anchor_bins_equal_a_loop_over_frames(width, num_bins):
    z = torch.randn(6, 12, 4, dtype=torch.float64).cumsum(dim=1) / 2
    expected = [loop_anchor(clip, width, num_bins) for clip in z]
    assert anchor_bins(z, width=width, num_bins=num_bins).tolist() == expected
    weights, lengths = sampling_weights(z, num_bins=num_bins, width=width, **ANCHOR)
    for clip, bins in enumerate(expected):
        assert lengths[clip] == max(bins) + 1
        for b in range(max(bins) + 1):
            row = torch.tensor([float(x == b) for x in bins], dtype=torch.float64)
            torch.testing.assert_close(weights[clip, b], row / row.sum())


def test_every_frame_of_an_anchor_sampling_counts_and_time_order_is_kept():
    weights, lengths = sampling_weights(torch.randn(20, 16, 8), num_bins=6, width=1.0, **ANCHOR)
    assert (weights.sum(dim=1) > 0).all()
    centres = (weights * torch.arange(16.0)).sum(dim=2)
    for clip, length in zip(centres, lengths.tolist()):
        assert (clip[:length].diff() > 0).all()


def test_a_static_clip_falls_into_one_bin_and_more_change_makes_more_bins():
    still = torch.randn(1, 1, 8).expand(1, 16, 8)
    assert sampling_weights(still, num_bins=16, width=0.1, **ANCHOR)[1].tolist() == [1]
    steps = torch.zeros(1, 16, 8)
    counts = []
    for changes in (1, 2, 4, 8):
        places = torch.arange(16) * (changes + 1) // 16  # `changes` jumps, evenly spread
        counts.append(sampling_weights(steps + places[None, :, None], num_bins=16, width=0.5, **ANCHOR)[1].item())
    assert counts == [2, 3, 5, 9]


@pytest.mark.parametrize("frames", [1, 2, 16])
@pytest.mark.parametrize("metric", ["l2", "l1", "cosine", "mahalanobis"])
def test_identical_frames_keep_one_bin_and_finite_gradients(metric, frames):
    z = torch.ones(1, frames, 4, requires_grad=True)
    weights, lengths = sampling_weights(z, num_bins=5, metric=metric)
    weights.sum().backward()
    assert lengths.tolist() == [1]
    assert weights.isfinite().all() and z.grad.isfinite().all()


@pytest.mark.parametrize(
    "change,message",
    [
        ({"similarity": "nearest"}, "similarity='nearest' does not exist"),
        ({"kernel": "cubic"}, "kernel='cubic' does not exist"),
        ({"num_bins": 0}, "num_bins must be a whole number of at least 1, not 0"),
        ({"num_bins": "4"}, "num_bins must be a whole number of at least 1, not '4'"),
        ({"num_bins": 2.5}, "num_bins must be a whole number of at least 1, not 2.5"),
        ({**ABSOLUTE, "width": torch.ones((), device="meta")}, "width is on meta and z on cpu: put them on one device"),
        ({"similarity": "path", "noise_floor": torch.ones((), device="meta")}, "noise_floor is on meta and z on cpu"),
        ({**ANCHOR}, "similarity=anchor with scale=absolute needs a width"),
        ({"similarity": "uniform", "kernel": "mean", **ABSOLUTE}, "similarity=uniform measures nothing that scale=absolute could cut: set scale=rel"),
        ({"similarity": "stride"}, "similarity=stride gives no position inside a bin, so kernel=linear means nothing: set kernel=mean"),
        ({"similarity": "anchor", "kernel": "delta", **ABSOLUTE}, "so kernel=delta means nothing: set kernel=mean"),
        ({"similarity": "anchor", "kernel": "mean"}, "similarity=anchor compares frames with one width .* scale=relative: set scale=absolute"),
        ({**ANCHOR, "width": 0.8, "metric": "cosine"}, "similarity=anchor measures root mean square distances, not metric=cosine: set metric=l2"),
        ({"similarity": "path", "metric": "mahalanobis"}, "similarity=path .* metric=mahalanobis is not defined: set metric=l2, l1 or cosine"),
        ({"metric": "l3"}, "metric='l3' does not exist; choose one of l2, l1, cosine, mahalanobis"),
        ({"scale": "log"}, "scale='log' does not exist; choose one of relative, absolute"),
        ({"edges": "none"}, "edges='none' does not exist; choose one of released, inclusive"),
        ({"order": "space"}, "order='space' does not exist; choose one of similarity, time"),
        ({"width": 1.0}, "width is not used by scale=relative, .* set scale=absolute or no width"),
        ({**ABSOLUTE, "width": None}, "needs a width"),
        ({**ABSOLUTE, "width": 0.0}, "width must be above 0, not 0.0"),
        ({**ABSOLUTE, "width": math.nan}, "width must be above 0, not nan"),
        ({"similarity": "path", "noise_floor": -1.0}, "noise_floor=-1.0 with similarity=path: it must be at least 0"),
        ({"noise_floor": 0.1}, "noise_floor=0.1 with similarity=distance_to_mean: .* 0 unless similarity=path"),
        ({"min_bins": 0}, "min_bins must be at least 1 and at most num_bins=4, not 0"),
        ({"min_bins": 5}, "min_bins must be at least 1 and at most num_bins=4, not 5"),
        ({"min_bins": 4, "valid": torch.tensor([5, 3])}, "a clip of 3 frames cannot give the 4 bins that are needed at least"),
        ({"valid": torch.tensor([5, 0])}, "a clip of 0 frames cannot give the 1 bins"),
        ({"valid": torch.tensor([6, 5])}, "valid announces a clip of 6 frames, of which z holds 5"),
        ({"valid": torch.tensor([5])}, "valid must hold one int64 for each of the 2 clips"),
        ({"valid": torch.tensor([5.0, 5.0])}, "valid must hold one int64 for each of the 2 clips"),
    ],
)
def test_choices_that_make_no_sense_are_refused_with_the_way_out(change, message):
    with pytest.raises(ValueError, match=message):
        sampling_weights(torch.randn(2, 5, 3), **{"num_bins": 4, **change})


def test_the_calibrated_width_gives_the_mean_number_of_bins_asked_for():
    z = torch.randn(200, 16, 8).cumsum(dim=1)
    for target in (3.0, 8.0, 12.0):
        width = calibrated_width(z, num_bins=16, mean_bins=target)
        mean = (anchor_bins(z, width=width, num_bins=16)[:, -1] + 1.0).mean()
        assert abs(mean - target) < 0.1


def test_uniform_bins_differ_in_size_by_at_most_one():
    for frames, bins in itertools.product(range(1, 20), range(1, 20)):
        sizes = torch.bincount(uniform_bins(frames, min(bins, frames)))
        assert len(sizes) == min(bins, frames) and sizes.max() - sizes.min() <= 1
