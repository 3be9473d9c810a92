"""Every combination of the sampling's choices against a loop over the frames of one clip."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tiers import slow_but
from torch import Tensor

from atfr.models.sgs.functional import calibrated_width, median_step, sampling_weights, uniform_bins

MEASURED = [
    *itertools.product(["distance_to_mean"], ["l2", "l1", "cosine", "mahalanobis"]),
    ("magnitude", "l2"),
    *itertools.product(["path"], ["l2", "l1", "cosine"]),
]
CUTS = [("relative", "released"), ("relative", "inclusive"), ("absolute", "released")]
KERNELS = ["linear", "linear_normalized", "delta", "delta_normalized", "mean"]
BASELINES = ["uniform", "stride", "random", "none"]
ANCHOR = dict(similarity="anchor", kernel="mean", scale="absolute", width=0.8)
PARTITION = dict(similarity="partition", kernel="mean", scale="absolute", width=0.6)

measured = pytest.mark.parametrize("similarity,metric", MEASURED)
cut = pytest.mark.parametrize("scale,edges", CUTS)


def every_choice(width: float) -> list[dict]:
    """All combinations that make sense, as keywords of sampling_weights."""
    choices = [{**ANCHOR, "order": order} for order in ("similarity", "time")]
    choices += [{**PARTITION, "cost_exponent": cost_exponent} for cost_exponent in (0.0, 0.5, 1.0)]
    choices += [dict(similarity=name, kernel="mean") for name in BASELINES]
    for (similarity, metric), (scale, edges), kernel, order in itertools.product(MEASURED, CUTS, KERNELS, ["similarity", "time"]):
        choice = dict(similarity=similarity, metric=metric, scale=scale, edges=edges, kernel=kernel, order=order)
        choices.append({**choice, "width": width} if scale == "absolute" else choice)
    return choices


def loop_distance(a: Tensor, b: Tensor, metric: str, eps: float) -> float:
    if metric == "cosine":
        return 1 - float(a @ b / (a.norm() * b.norm()))
    differences = [abs(x - y + eps) for x, y in zip(a.tolist(), b.tolist())]
    return sum(differences) if metric == "l1" else math.sqrt(sum(d**2 for d in differences))


def loop_distances(z: Tensor, similarity: str, metric: str, noise_floor: float = 0.0) -> list[float]:
    """d_t of one clip [T, D], one frame at a time."""
    if similarity == "magnitude":
        return [math.sqrt(sum(v**2 for v in frame.tolist())) for frame in z]
    if similarity == "path":
        distances = [0.0]
        for before, frame in zip(z, z[1:]):
            distances.append(distances[-1] + max(0.0, loop_distance(frame, before, metric, 0.0) - noise_floor))
        return distances
    mean = sum(z) / len(z)
    if metric != "mahalanobis":
        return [loop_distance(mean, frame, metric, 1e-6) for frame in z]
    covariance = sum(torch.outer(frame - mean, frame - mean) for frame in z) / (len(z) - 1)
    return [float((frame - mean) @ torch.linalg.inv(covariance) @ (frame - mean)) for frame in z]


def loop_weights(distances: list[float], *, num_bins, kernel, scale, edges, order, width=None) -> Tensor:
    """One clip's kept rows [B', T]."""
    if scale == "absolute":
        positions = [min(2 * d / width, 2 * num_bins - 1) for d in distances]
    else:
        reach = 2 * num_bins if edges == "released" else 2 * num_bins - 1
        positions = [d * reach / max(distances) for d in distances]
    members: dict[int, list[int]] = {}
    for t, s in enumerate(positions):
        members.setdefault(min(int(s // 2), num_bins - 1), []).append(t)
    kept = sorted(members)
    if order == "time":
        kept.sort(key=lambda b: sum(members[b]) / len(members[b]))  # stable: ties stay in order of similarity
    rows = torch.zeros(len(kept), len(positions), dtype=torch.float64)
    for row, b in zip(rows, kept):
        for t in members[b]:
            row[t] = max(0.0, 1 + 1e-7 - abs(positions[t] - (2 * b + 1))) if kernel.startswith("linear") else 1.0
    if rows.sum() < 1e-3:
        rows, kernel = (rows > 0).double(), "mean"
    if kernel == "mean" or kernel.endswith("normalized"):
        rows = rows / (rows > 0).sum(dim=1, keepdim=True)
    return rows


@measured
@cut
@pytest.mark.parametrize("order", ["similarity", "time"])
def test_weights_equal_a_loop_over_frames(similarity, metric, scale, edges, order):
    z = torch.randn(3, 11, 3, dtype=torch.float64)
    noise_floor = 0.1 if similarity == "path" else 0.0
    distances = [loop_distances(clip, similarity, metric, noise_floor) for clip in z]
    width = max(map(max, distances)) / 6.3 if scale == "absolute" else None
    for num_bins, kernel in itertools.product((1, 4, 11, 13), KERNELS):
        choice = dict(num_bins=num_bins, kernel=kernel, scale=scale, edges=edges, order=order, width=width)
        weights, lengths = sampling_weights(z, similarity=similarity, metric=metric, noise_floor=noise_floor, **choice)
        assert weights.shape == (3, num_bins, 11) and weights.dtype == torch.float64
        for clip, length, d in zip(weights, lengths, distances):
            expected = loop_weights(d, **choice)
            assert length == len(expected)
            torch.testing.assert_close(clip[:length], expected, atol=1e-9, rtol=1e-7)
            assert not clip[length:].any()


@pytest.mark.parametrize("min_bins", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_padded_clip_is_sampled_as_it_is_alone(min_bins):
    z, valid = torch.randn(4, 9, 3, dtype=torch.float64), torch.tensor([9, 4, 6, 3])
    z[3] = z[3, :1]  # a static one
    for n, length in enumerate(valid.tolist()):
        z[n, length:] = torch.tensor([torch.nan, torch.inf, 1e30, -7.0])[n]
    for choice in every_choice(width=0.7):
        if choice["similarity"] == "path":
            choice["noise_floor"] = torch.tensor(0.1)
        weights, lengths = sampling_weights(z, num_bins=5, valid=valid, min_bins=min_bins, **choice)
        assert lengths.min() >= min_bins, choice
        for n, length in enumerate(valid.tolist()):
            alone, kept = sampling_weights(z[n : n + 1, :length], num_bins=5, min_bins=min_bins, **choice)
            assert lengths[n] == kept, choice
            torch.testing.assert_close(weights[n, :kept, :length], alone[0, :kept], msg=str(choice))
            assert not weights[n, kept:].any() and not weights[n, :, length:].any()


def test_padding_gets_no_gradient_and_valid_clips_the_one_they_get_alone():
    z, valid = torch.randn(2, 8, 3, dtype=torch.float64), torch.tensor([8, 5])
    for choice in every_choice(width=0.7):
        if choice["kernel"] == "mean":
            continue
        padded, alone = z.clone().requires_grad_(), z[1:, :5].clone().requires_grad_()
        rows = torch.randn(2, 6, 8, dtype=torch.float64)
        (sampling_weights(padded, num_bins=6, valid=valid, **choice)[0] * rows).sum().backward()
        (sampling_weights(alone, num_bins=6, **choice)[0] * rows[1:, :, :5]).sum().backward()
        torch.testing.assert_close(padded.grad[1, :5], alone.grad[0], msg=str(choice))
        assert not padded.grad[1, 5:].any(), choice


def test_weights_add_up_to_one_in_a_bin_or_over_a_frame_as_the_kernel_promises():
    z, valid = torch.randn(5, 10, 4), torch.tensor([10, 7, 5, 2, 1])
    for choice in every_choice(width=0.6):
        weights, lengths = sampling_weights(z, num_bins=6, valid=valid, **choice)
        if choice["kernel"] in ("mean", "delta_normalized"):
            kept = torch.arange(weights.shape[1]) < lengths[:, None]
            torch.testing.assert_close(weights.sum(dim=2), kept.float(), msg=str(choice))
        if choice["kernel"] == "delta":
            torch.testing.assert_close(weights.sum(dim=1), (torch.arange(10) < valid[:, None]).float(), msg=str(choice))


def test_the_farthest_frame_counts_in_its_bin_in_float32_as_it_does_in_float64():
    z = torch.randn(500, 11, 8)
    for num_bins in (7, 8, 13, 30):
        weights, doubles = (sampling_weights(x, num_bins=num_bins, kernel="linear_normalized") for x in (z, z.double()))
        same = weights[1] == doubles[1]  # but for the few clips in which rounding moves a frame over an edge
        assert same.float().mean() > 0.99
        torch.testing.assert_close(weights[0][same], doubles[0][same].float(), atol=1e-3, rtol=0)


@measured
@cut
@pytest.mark.parametrize("kernel", slow_but(["linear", "linear_normalized"], "linear_normalized".__eq__))
def test_the_linear_kernels_gradient_passes_gradcheck(similarity, metric, scale, edges, kernel):
    z = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    width = max(max(loop_distances(clip, similarity, metric)) for clip in z.detach()) / 3.3 if scale == "absolute" else None
    choice = dict(similarity=similarity, metric=metric, scale=scale, edges=edges, kernel=kernel, width=width)
    assert torch.autograd.gradcheck(lambda z: sampling_weights(z, num_bins=3, **choice)[0], (z,))
    assert torch.autograd.grad((sampling_weights(z, num_bins=3, **choice)[0] ** 2).sum(), z)[0].abs().max() > 1e-3


@pytest.mark.parametrize("kernel", ["delta", "delta_normalized"])
@pytest.mark.parametrize("similarity", ["distance_to_mean", "magnitude", "path"])
@pytest.mark.parametrize("scale", ["relative", "absolute"])
def test_the_delta_kernel_passes_the_released_surrogate_gradient(kernel, similarity, scale):
    z = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    width = {"distance_to_mean": 0.45, "magnitude": 0.45, "path": 3.0}[similarity] if scale == "absolute" else None
    choice = dict(num_bins=4, similarity=similarity, kernel=kernel, scale=scale, edges="inclusive", width=width)
    weights, lengths = sampling_weights(z[None], **choice)
    incoming = torch.randn_like(weights)
    given = torch.autograd.grad(weights, z, incoming)[0]

    if similarity == "distance_to_mean":
        distances = [(z.mean(dim=0) - frame + 1e-6).norm() for frame in z]
    elif similarity == "magnitude":
        distances = [frame.norm() for frame in z]
    else:
        distances = [z.sum() * 0]
        for before, frame in zip(z, z[1:]):
            distances.append(distances[-1] + (frame - before).norm())
    scales = 2 / width if width else (2 * 4 - 1) / torch.stack(distances).max()
    surrogate = 0.0
    for b in range(int(lengths)):
        members = weights[0, b].nonzero().flatten().tolist()
        for t in members:
            position = distances[t] * scales
            if position.detach() < 2 * 4 - 1 or not width:  # beyond the last centre a position does not move
                surrogate = surrogate + incoming[0, b, t] * position / (len(members) if kernel == "delta_normalized" else 1)
    expected = torch.autograd.grad(surrogate, z)[0]
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(given, expected)


DEGENERATE = ["one frame", "two frames", "identical", "half and half", "zero", "identical but for one", "alternating"]


def degenerate_clips(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    z = torch.full((len(DEGENERATE), 6, 4), 0.1)
    z[1, 1], z[3, 3:], z[4], z[5, 2], z[6, ::2] = -0.2, 0.3, 0.0, 0.7, -0.1
    return z.to(dtype), torch.tensor([1, 2, 6, 6, 6, 6, 6])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_bins", [1, 5, 32])
def test_degenerate_clips_keep_a_bin_their_content_and_finite_gradients(num_bins, dtype):
    z, valid = degenerate_clips(dtype)
    for choice in every_choice(width=0.25):
        z = z.detach().requires_grad_()
        weights, lengths = sampling_weights(z, num_bins=num_bins, valid=valid, **choice)
        assert weights.dtype == torch.float32 and weights.isfinite().all() and lengths.min() >= 1, choice
        if choice["similarity"] not in BASELINES:
            assert lengths[[2, 4]].tolist() == [1, 1], choice  # identical frames share a bin
        total = weights.detach().sum(dim=(1, 2))
        assert total.min() >= (1e-3 if "linear" not in choice["kernel"] else 1e-3 / 6), (choice, total)
        if dtype == torch.float32 and weights.requires_grad:
            (weights * torch.randn_like(weights)).sum().backward()
            assert z.grad.isfinite().all(), choice


@pytest.mark.parametrize("kernel", ["linear", "linear_normalized"])
def test_a_clip_whose_frames_all_lie_on_the_outer_edge_is_averaged_instead_of_lost(kernel):
    z, valid = degenerate_clips(torch.float64)
    weights, lengths = sampling_weights(z, num_bins=7, kernel=kernel, valid=valid)
    for n in (0, 2, 4):  # one frame, identical frames, zeros
        assert lengths[n] == 1
        torch.testing.assert_close(weights[n, 0, : valid[n]], torch.full((int(valid[n]),), 1 / float(valid[n]), dtype=torch.float64))
    busy, alone = torch.randn(1, 6, 4, dtype=torch.float64), dict(num_bins=7, kernel=kernel)
    together = sampling_weights(torch.cat([z[2:3], busy]), **alone)[0][1]
    torch.testing.assert_close(together, sampling_weights(busy, **alone)[0][0])
    assert together.max(dim=0).values.min() < 1e-6  # the farthest frame of a busy clip is lost, as released


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf])
def test_a_nan_gives_its_clip_nan_weights_and_leaves_the_others_alone(spoilt):
    z = torch.randn(3, 8, 4)
    clean, z[1, 3, 2] = z.clone(), spoilt
    for choice in every_choice(width=0.5):
        weights, lengths = sampling_weights(z, num_bins=6, **choice)
        expected, expected_lengths = sampling_weights(clean, num_bins=6, **choice)
        assert weights[1].isnan().all() and lengths[1] >= 1, choice
        assert torch.equal(weights[[0, 2]], expected[[0, 2]]) and torch.equal(lengths[[0, 2]], expected_lengths[[0, 2]])


def test_a_width_that_is_a_nan_gives_nan_weights_and_distances_too_large_do_too():
    for similarity in ("anchor", "partition", "path", "magnitude", "distance_to_mean"):
        choice = dict(num_bins=4, similarity=similarity, kernel="mean", scale="absolute")
        assert sampling_weights(torch.randn(2, 5, 3), width=torch.tensor(torch.nan), **choice)[0].isnan().all()
        z = torch.randn(2, 5, 3)
        expected = sampling_weights(z, width=0.5, **choice)
        for one, other in zip(sampling_weights(z, width=torch.tensor(0.5), **choice), expected):
            assert torch.equal(one, other)
    z[0, 2] = 1e30
    for choice in ({}, dict(scale="absolute", width=0.5)):
        weights = sampling_weights(z, num_bins=4, **choice)[0]
        assert weights[0].isnan().all() and weights[1].isfinite().all()


def test_half_precision_is_computed_in_float32():
    z = torch.randn(2, 9, 4)
    for dtype, choice in itertools.product((torch.float16, torch.bfloat16), every_choice(width=0.5)):
        half, full = (sampling_weights(values, num_bins=7, **choice) for values in (z.to(dtype), z.to(dtype).float()))
        assert torch.equal(half[0], full[0]) and torch.equal(half[1], full[1]), choice


@pytest.mark.parametrize("similarity", ["distance_to_mean", "magnitude", "path"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_with_an_absolute_width_a_static_clip_is_one_bin_and_more_change_makes_more_bins(similarity, kernel):
    choice = dict(num_bins=64, similarity=similarity, kernel=kernel, scale="absolute", width=0.5)
    assert sampling_weights(torch.randn(1, 1, 4).expand(1, 64, 4), **choice)[1].tolist() == [1]
    line = torch.linspace(0, 1, 64)[None, :, None]
    counts = [sampling_weights(line * change, **choice)[1].item() for change in (1, 2, 4, 8, 16)]
    assert all(more >= 1.5 * fewer for fewer, more in zip(counts, counts[1:])), counts


def test_frames_beyond_the_last_bin_of_an_absolute_width_count_fully():
    z = torch.tensor([0.1, 0.5, 2.5, 90.0])[None, :, None]
    weights, lengths = sampling_weights(z, num_bins=2, similarity="magnitude", scale="absolute", width=1.0)
    assert lengths.tolist() == [2]
    torch.testing.assert_close(weights[0], torch.tensor([[0.2, 1, 0, 0], [0, 0, 1, 1]]))


def test_path_bins_are_contiguous_in_time_and_a_noise_floor_silences_noise():
    z = torch.randn(20, 16, 8) / 10
    choice = dict(num_bins=16, similarity="path", kernel="mean", scale="absolute", width=0.5)
    weights, lengths = sampling_weights(z, **choice)
    for clip, length in zip(weights, lengths):
        order = clip[:length].nonzero()[:, 1]  # frames by bin, then by time
        assert order.tolist() == list(range(16))
    assert lengths.min() > 3
    z[:, 8:] += 5
    quiet, floor = sampling_weights(z, noise_floor=torch.tensor(2.0), **choice), sampling_weights(z, noise_floor=2.0, **choice)
    assert quiet[1].tolist() == [2] * 20 and torch.equal(quiet[0], floor[0])
    torch.testing.assert_close(quiet[0][:, :2], torch.tensor([[1.0] * 8 + [0] * 8, [0] * 8 + [1.0] * 8]).expand(20, 2, 16) / 8)


@pytest.mark.parametrize("frames,num_bins", itertools.product([1, 2, 7, 16], [1, 3, 8, 20]))
def test_the_baselines_look_at_nothing_but_the_number_of_frames(frames, num_bins):
    kept = min(frames, num_bins)
    drawn = {}
    for name in BASELINES:
        weights, lengths = sampling_weights(torch.randn(3, frames, 2), num_bins=num_bins, similarity=name, kernel="mean")
        again = sampling_weights(torch.randn(1, frames, 2), num_bins=num_bins, similarity=name, kernel="mean")[0]
        assert weights.shape == (3, max(num_bins, frames) if name == "none" else num_bins, frames)
        assert torch.equal(weights, again.expand_as(weights))
        assert lengths.tolist() == [frames if name == "none" else kept] * 3
        drawn[name] = weights[0, : lengths[0]].tolist()
    bins = uniform_bins(frames, kept).tolist()
    members = [[t for t in range(frames) if bins[t] == b] for b in range(kept)]
    for b, frames_of_bin in enumerate(members):
        expected = [1 / len(frames_of_bin) if t in frames_of_bin else 0.0 for t in range(frames)]
        assert drawn["uniform"][b] == pytest.approx(expected)
        middle = frames_of_bin[(len(frames_of_bin) - 1) // 2]
        assert drawn["stride"][b] == [float(t == middle) for t in range(frames)]
    chosen = [row.index(1.0) for row in drawn["random"]]
    assert sum(map(sum, drawn["random"])) == kept and chosen == sorted(set(chosen))
    assert drawn["none"] == torch.eye(frames).tolist()


def test_random_frames_are_spread_over_the_clip_and_differ_between_lengths():
    drawn = [sampling_weights(torch.zeros(1, t, 1), num_bins=4, similarity="random", kernel="mean")[0][0] for t in range(20, 60)]
    places = [(row.argmax(dim=1) / row.shape[1]).tolist() for row in drawn]
    assert 0.4 < sum(map(sum, places)) / 160 < 0.6
    assert len({tuple(row.argmax(dim=1).tolist()) for row in drawn}) > 35


def test_a_clip_with_too_few_bins_is_cut_into_the_least_number_of_equal_parts():
    z, valid = torch.randn(3, 10, 4, dtype=torch.float64), torch.tensor([10, 7, 4])
    z[1:] = 0.3
    for choice in every_choice(width=0.01):
        if choice["similarity"] == "partition":  # takes the best cut into so many, see test_partition
            continue
        weights, lengths = sampling_weights(z, num_bins=8, valid=valid, min_bins=4, **choice)
        plain, plain_lengths = sampling_weights(z, num_bins=8, valid=valid, **choice)
        for n, length in enumerate(valid.tolist()):
            if plain_lengths[n] >= 4:
                assert torch.equal(weights[n], plain[n]) and lengths[n] == plain_lengths[n], choice
                continue
            bins = uniform_bins(length, 4)
            parts = torch.stack([(bins == b) / (bins == b).sum() for b in range(4)]).double()
            assert lengths[n] == 4
            torch.testing.assert_close(weights[n, :4, :length], parts, rtol=1e-6, atol=0, msg=str(choice))
            assert not weights[n, 4:].any() and not weights[n, :, length:].any()
    assert sampling_weights(z, num_bins=8, valid=valid, min_bins=4)[1][1:].tolist() == [4, 4]


@pytest.mark.parametrize("similarity,metric", [*MEASURED, ("anchor", "l2"), ("partition", "l2")])
def test_the_calibrated_width_gives_the_mean_number_of_bins_asked_for(similarity, metric):
    z, valid = torch.randn(80, 16, 8).cumsum(dim=1), torch.arange(80) % 9 + 8
    floor = median_step(z, metric, valid) / 2 if similarity == "path" else 0.0
    for target in (1.0, 3.0, 5.0):
        choice = dict(similarity=similarity, metric=metric, noise_floor=floor, valid=valid, num_bins=32)
        width = calibrated_width(z, mean_bins=target, **choice)
        padded = z.masked_fill((torch.arange(16) >= valid[:, None])[:, :, None], torch.nan)
        assert calibrated_width(padded, mean_bins=target, **choice) == width
        narrower, mean, *wider = (
            sampling_weights(z, width=width * factor, kernel="mean", scale="absolute", **choice)[1].float().mean()
            for factor in (0.9, 1, 1.1, 1.5, 3)
        )
        assert target - 0.1 < mean <= target < narrower
        assert max(wider) <= target


def test_where_no_width_keeps_as_many_bins_as_asked_for_the_best_is_taken():
    z = torch.randn(10, 6, 3)
    for similarity in ("anchor", "partition", "path", "magnitude"):

        def mean_at(width):
            return sampling_weights(z, num_bins=6, similarity=similarity, kernel="mean", scale="absolute", width=width)[1].float().mean()

        assert mean_at(calibrated_width(z, num_bins=6, mean_bins=0.5, similarity=similarity)) == 1
        most = mean_at(calibrated_width(z, num_bins=6, mean_bins=50, similarity=similarity))
        assert 3 < most <= 6 and most >= 0.95 * max(mean_at(1.05**k) for k in range(-60, 60))


def test_nothing_is_calibrated_on_a_nan():
    z = torch.randn(10, 6, 3)
    z[3, 2] = torch.nan
    for measure in (median_step, lambda z: calibrated_width(z, num_bins=4, mean_bins=2)):
        with pytest.raises(ValueError, match="hold a NaN or an infinity"):
            measure(z)


@pytest.mark.parametrize("metric", ["l2", "l1", "cosine"])
def test_the_median_step_is_that_of_a_loop_over_steps(metric):
    z, valid = torch.randn(7, 9, 3, dtype=torch.float64), [9, 1, 2, 5, 9, 3, 4]
    steps = sorted(loop_distance(z[n, t], z[n, t - 1], metric, 0.0) for n in range(7) for t in range(1, valid[n]))
    assert median_step(z, metric, torch.tensor(valid)) == pytest.approx(steps[(len(steps) - 1) // 2])
    assert median_step(z[:, :1], metric) == 0
