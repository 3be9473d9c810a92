"""The best cut into contiguous bins against all cuts there are, tried one by one."""

from __future__ import annotations

import pytest
import torch
from cuts_by_trial import all_cuts, bins_by_trial, left_over
from tiers import slow_but

from atfr.models.sgs.functional import calibrated_width, check_choices, sampling_weights
from atfr.models.sgs.partition import best_cuts, partition_bins, width_keeping

CHOICE = dict(similarity="partition", kernel="mean", scale="absolute", order="time")


CUTS = [(least, most, exponent) for least, most in ((1, 8), (1, 3), (3, 8), (1, 20), (4, 4)) for exponent in (0.0, 0.5, 1.0)]


@pytest.mark.parametrize("least, most, cost_exponent", slow_but(CUTS, ((1, 8, 0.5), (1, 3, 1.0), (3, 8, 0.0), (1, 20, 0.5), (4, 4, 0.5)).__contains__))
def test_bins_are_those_of_the_cheapest_of_all_cuts(least, most, cost_exponent):
    z = torch.randn(12, 8, 3, dtype=torch.float64).cumsum(dim=1)
    lengths = torch.tensor([8, 8, 8, 5, 7, 3] * 2)
    z = z.masked_fill(torch.arange(8)[None, :, None] >= lengths[:, None, None], 0)
    found = []
    for width in (0.1, 0.3, 0.6, 1.2):
        bins = partition_bins(z, lengths, width=width, num_bins=most, min_bins=least, cost_exponent=cost_exponent)
        for clip, length, own in zip(z, lengths.tolist(), bins.tolist()):
            assert own[:length] == bins_by_trial(clip[:length], width=width, cost_exponent=cost_exponent, least=min(least, length), most=most)
            found.append(own[length - 1] + 1)
    assert len(set(found)) > 2 or most < 5


def test_the_least_variance_of_each_number_of_bins_is_that_of_the_best_of_all_cuts():
    z = torch.randn(3, 7, 2, dtype=torch.float64)
    least, _ = best_cuts(z, torch.tensor([7, 7, 4]), num_bins=7)
    for clip, length, row in zip(z, (7, 7, 4), least.tolist()):
        for k in range(1, length + 1):
            assert row[k - 1] == pytest.approx(min(left_over(clip[:length], cut) for cut in all_cuts(clip[:length], k)), abs=1e-4)
        assert all(value == float("inf") for value in row[length:])


def test_a_short_moment_keeps_its_bin_where_a_slow_drift_gets_none():
    drift = torch.linspace(0, 1, 16)[:, None].repeat(1, 4)
    flash = torch.zeros(16, 4)
    flash[9] = 3
    _, lengths = sampling_weights(torch.stack([drift, flash]), num_bins=16, width=1.3, **CHOICE)
    assert lengths.tolist() == [1, 3]


def test_evenness_makes_clips_of_the_same_shape_keep_equally_many_whatever_the_amount_of_change():
    z = torch.randn(1, 16, 4).cumsum(dim=1)
    z = torch.cat([z, z / 10, z * 0])

    def kept(cost_exponent: float) -> list[int]:
        return sampling_weights(z, num_bins=16, width=0.3, cost_exponent=cost_exponent, **CHOICE)[1].tolist()

    busy, quiet, still = kept(0.0)
    assert busy > quiet >= still == 1
    assert kept(1.0)[0] == kept(1.0)[1] > 1 and kept(1.0)[2] == 1
    assert busy - quiet > kept(0.5)[0] - kept(0.5)[1] >= 0 and kept(0.5)[2] == 1


@pytest.mark.parametrize("cost_exponent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("mean_bins", [2.0, 4.5, 9.0])
def test_a_calibrated_width_is_the_widest_that_does_not_exceed_the_mean(cost_exponent, mean_bins):
    z = torch.randn(200, 16, 4).cumsum(dim=1) * torch.rand(200, 1, 1)
    width = calibrated_width(z, num_bins=16, mean_bins=mean_bins, similarity="partition", cost_exponent=cost_exponent)
    means = [sampling_weights(z, num_bins=16, width=w, cost_exponent=cost_exponent, **CHOICE)[1].double().mean().item() for w in (width, width * 0.99)]
    assert mean_bins - 0.2 < means[0] <= mean_bins <= means[1] + 0.02


def test_a_partition_has_one_price_for_all_clips_and_no_position_inside_a_bin():
    with pytest.raises(ValueError, match="similarity=partition compares frames with one width .* scale=relative"):
        check_choices("partition", "l2", "mean", "relative", "released", "time")
    with pytest.raises(ValueError, match="so kernel=linear means nothing"):
        check_choices("partition", "l2", "linear", "absolute", "released", "time")


@pytest.mark.parametrize("cost_exponent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("mean_bins", [1.0, 1.3, 3.0, 5.21, 7.9])
def test_the_width_that_keeps_a_mean_is_the_one_that_a_search_finds(cost_exponent, mean_bins):
    lengths = torch.tensor([12, 12, 5, 9, 12, 1, 12])
    z = torch.randn(7, 12, 3, dtype=torch.float64).cumsum(dim=1)
    z[4] = z[4, :1]  # a static clip, which keeps one bin at any price
    z = z.masked_fill(torch.arange(12)[None, :, None] >= lengths[:, None, None], 0)
    found = width_keeping(z, lengths, num_bins=10, mean_bins=mean_bins, cost_exponent=cost_exponent)
    searched = calibrated_width(z, num_bins=10, mean_bins=mean_bins, valid=lengths, similarity="partition", cost_exponent=cost_exponent)
    assert found.item() == pytest.approx(searched, rel=3e-4) or mean_bins == 7.9  # more than there is to keep
    bins = partition_bins(z, lengths, width=found, num_bins=10, cost_exponent=cost_exponent)
    kept = [len(set(own[:length])) for own, length in zip(bins.tolist(), lengths.tolist())]
    assert sum(kept) == min(int(7 * mean_bins + 1e-6), sum(kept)) and (sum(kept) == int(7 * mean_bins + 1e-6) or mean_bins == 7.9)


@pytest.mark.parametrize("similarity", ["partition", "anchor"])
def test_kernel_middle_keeps_the_middle_frame_of_each_bin_and_the_earlier_one_of_two(similarity):
    lengths = torch.tensor([12, 7, 12])
    z = torch.randn(3, 12, 4).cumsum(dim=1) * torch.tensor([1.0, 2.0, 0.5])[:, None, None]
    choice = {**CHOICE, "similarity": similarity}
    mean, kept = sampling_weights(z, num_bins=9, width=1.1, valid=lengths, min_bins=2, **choice)
    middle, same = sampling_weights(z, num_bins=9, width=1.1, valid=lengths, min_bins=2, **{**choice, "kernel": "middle"})
    assert kept.equal(same) and len(set(kept.tolist())) > 1
    for clip in range(3):
        for b in range(kept[clip]):
            members = mean[clip, b].nonzero()[:, 0].tolist()
            chosen = members[(len(members) - 1) // 2]
            assert middle[clip, b].tolist() == [float(t == chosen) for t in range(12)]
        assert not middle[clip, kept[clip] :].any()


def test_kernel_middle_is_refused_where_bins_are_not_contiguous():
    with pytest.raises(ValueError, match="similarity=distance_to_mean does not have"):
        check_choices("distance_to_mean", "l2", "middle", "relative", "released", "time")
