"""The sampling mathematics against a loop over frames, written from the paper's equations."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from atfr.models.sgs import anchor_bins, calibrated_width, sampling_weights, uniform_bins
from atfr.models.sgs_layer import SGS, SGSOptions, aggregate

ANCHOR = dict(similarity="anchor", kernel="mean", scale="absolute", order="time")
ATFR = SGSOptions(**ANCHOR, embedding="pooled", before_activation=False)


def loop_distance(z: torch.Tensor, metric: str) -> list[float]:
    """Distances of one clip's frames [T, D] from their mean, one frame at a time."""
    mean = z.mean(0)
    distances = []
    for frame in z:
        d = mean - frame + 1e-6
        if metric == "l2":
            distances.append(math.sqrt(sum(v**2 for v in d.tolist())))
        elif metric == "l1":
            distances.append(sum(abs(v) for v in d.tolist()))
        elif metric == "cosine":
            distances.append(1 - float(mean @ frame / (mean.norm() * frame.norm())))
        else:
            centred = z - mean
            covariance = sum(torch.outer(c, c) for c in centred) / (len(z) - 1)
            c = frame - mean
            distances.append(float(c @ torch.linalg.inv(covariance) @ c))
    return distances


def loop_weights(z, *, num_bins, metric="l2", kernel="linear", edges="released", order="similarity"):
    """One clip's kept rows [B', T] for distance_to_mean."""
    distances = loop_distance(z, metric)
    reach = 2 * num_bins if edges == "released" else 2 * num_bins - 1
    positions = [d * reach / max(distances) for d in distances]
    members = {}
    for t, s in enumerate(positions):
        members.setdefault(min(int(s // 2), num_bins - 1), []).append(t)
    kept = sorted(members)
    if order == "time":
        kept.sort(key=lambda b: sum(members[b]) / len(members[b]))  # stable: ties stay in order of similarity
    rows = []
    for b in kept:
        row = [0.0] * len(positions)
        for t in members[b]:
            weight = 1.0 if kernel == "mean" else max(0.0, 1 + 1e-7 - abs(positions[t] - (2 * b + 1)))
            row[t] = weight if kernel == "linear" else weight / len(members[b])
        rows.append(row)
    return torch.tensor(rows, dtype=z.dtype)


@pytest.mark.parametrize(
    "metric,kernel,edges,order",
    itertools.product(
        ["l2", "l1", "cosine", "mahalanobis"],
        ["linear", "linear_normalized", "mean"],
        ["released", "inclusive"],
        ["similarity", "time"],
    ),
)
def test_distance_to_mean_equals_a_loop_over_frames(metric, kernel, edges, order):
    z = torch.randn(5, 11, 3, dtype=torch.float64)
    for num_bins in (1, 4, 11, 13):
        weights, lengths = sampling_weights(z, num_bins=num_bins, metric=metric, kernel=kernel, edges=edges, order=order)
        assert weights.shape == (5, num_bins, 11)
        for clip in range(5):
            expected = loop_weights(z[clip], num_bins=num_bins, metric=metric, kernel=kernel, edges=edges, order=order)
            assert lengths[clip] == len(expected)
            torch.testing.assert_close(weights[clip, : len(expected)], expected, atol=1e-9, rtol=1e-7)
            assert not weights[clip, len(expected) :].any()


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


def test_the_linear_kernels_gradient_passes_gradcheck_away_from_ties():
    z = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    for kernel in ("linear", "linear_normalized"):
        assert torch.autograd.gradcheck(lambda z: sampling_weights(z, num_bins=4, kernel=kernel, edges="inclusive")[0], (z,))


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
        ({"similarity": "anchor", "scale": "relative"}, "set scale=absolute"),
        ({"similarity": "anchor", "scale": "absolute", "kernel": "linear"}, "set kernel=mean"),
        ({"num_bins": 0}, "num_bins must be at least 1"),
        ({"scale": "absolute"}, "set scale=relative"),
        ({**ANCHOR}, "needs a width"),
    ],
)
def test_choices_that_make_no_sense_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        sampling_weights(torch.randn(1, 4, 3), **{"num_bins": 4, **change})


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


def test_aggregation_equals_a_sum_over_frames_of_each_clip_in_turn():
    x = torch.randn(3, 4, 6, 2, 5)
    weights, lengths = sampling_weights(torch.randn(3, 6, 8), num_bins=4)
    lengths = tuple(lengths.tolist())
    rows = [
        sum(weights[n, b, t] * x[n, :, t] for t in range(6)) for n, length in enumerate(lengths) for b in range(length)
    ]
    torch.testing.assert_close(aggregate(x, weights, lengths)[0].transpose(0, 1), torch.stack(rows))


def test_a_nan_in_one_clip_is_refused_naming_the_layer_and_the_clip():
    layer = SGS(4, SGSOptions(after="res3"))
    x = torch.randn(3, 4, 6, 5, 5)
    x[1, 2, 3] = torch.nan
    for mode in (True, False):
        layer.train(mode)
        with pytest.raises(ValueError, match="SGS after 'res3': the features of clip 1 of the batch hold a NaN"):
            layer(x)
    layer.embedding.out.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="SGS after 'res3': the similarity embedding holds a NaN"):
        layer(torch.randn(3, 4, 6, 5, 5))


def test_a_width_that_was_never_calibrated_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="has no bin width yet: calibrate it"):
        SGS(4, ATFR)(torch.randn(1, 4, 6, 8, 8))


def test_steering_narrows_the_width_when_too_few_bins_are_kept():
    layer = SGS(4, ATFR)
    layer.width.fill_(1.0)
    layer.steer(torch.tensor(0.2))
    assert layer.width < 1
    layer.width.fill_(1.0)
    layer.steer(torch.tensor(0.9))
    assert layer.width > 1


@pytest.mark.parametrize("metric", ["l2", "l1", "cosine", "mahalanobis"])
def test_under_autocast_the_sampling_is_the_float32_one(metric):
    layer = SGS(8, SGSOptions(metric=metric)).eval()
    x = torch.randn(4, 8, 16, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights, lengths = layer(x)
        sums = aggregate(x, weights, lengths)
        assert aggregate(x.bfloat16(), weights, lengths).dtype == torch.bfloat16
    torch.testing.assert_close(sums, aggregate(x, weights, lengths))
    expected, expected_lengths = layer(x)
    assert weights.dtype == torch.float32 and lengths == expected_lengths
    torch.testing.assert_close(weights, expected)
