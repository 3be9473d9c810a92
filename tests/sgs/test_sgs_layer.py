"""The SGS layer: what it proposes, how it sums frames into bins, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from cuts_by_trial import bins_by_trial

from atfr.models.packed.segments import Segments
from atfr.models.sgs.config import SGSConfig
from atfr.models.sgs.layer import SGS
from atfr.models.sgs.sampling import NonFiniteFeatures, sample

ATFR = SGSConfig.from_preset("atfr", keep_ratio=0.5)
REFERENCE = SGSConfig.from_preset("reference")
EQUAL = replace(ATFR, same_number=True)
RANGED = replace(ATFR, gflops_range=(0.2, 1.0), keep_ratio=0.3)
EVERY_KIND = [
    SGSConfig.from_preset("atfr", width=0.6),
    EQUAL,
    SGSConfig.from_preset("atfr", similarity="anchor", width=0.9),
    REFERENCE,
    SGSConfig.from_preset("reference", similarity="magnitude", kernel="linear_normalized", edges="inclusive", order="time"),
    SGSConfig.from_preset("reference", similarity="path", kernel="delta_normalized", scale="absolute", width=2.0),
    SGSConfig.from_preset("frozen", kernel="mean"),
    *(SGSConfig.from_preset(name, keep_ratio=0.5) for name in ("uniform", "stride", "random")),
    SGSConfig.from_preset("identity"),
]


def layer_of(options: SGSConfig = ATFR, *, name: str = "res3", **more) -> SGS:
    return SGS(4, options, name=name, **more)


def features(clips: int = 5, frames: int = 12) -> torch.Tensor:
    return torch.randn(clips, 4, frames, 6, 6).cumsum(dim=2) / 2


def packed_features(lengths: tuple[int, ...], frames: int) -> tuple[torch.Tensor, Segments, torch.Tensor]:
    """The first so many features of each clip, packed; their segments; and the clips as they were."""
    x = features(len(lengths), frames)
    pieces = torch.cat([clip[:, :length] for clip, length in zip(x, lengths)], dim=1)[None]
    times = torch.cat([torch.arange(float(length)) for length in lengths])
    return pieces, Segments(lengths, frames, times), x


@pytest.mark.parametrize("options", EVERY_KIND, ids=lambda o: o.similarity)
def test_packed_features_are_sampled_as_each_clip_alone(options):
    lengths = (7, 3, 12, 1, 5)
    layer = layer_of(options).eval()
    x, segments, clips = packed_features(lengths, 12)
    (together,), (done,) = sample([layer], [x], [segments])
    for i, length in enumerate(lengths):
        alone, one = Segments((length,), 12, torch.arange(float(length))), clips[i : i + 1, :, :length]
        (expected,), (one_done,) = sample([layer], [one], [alone])
        assert done.segments.lengths[i] == one_done.segments.lengths[0]
        torch.testing.assert_close(together.split(done.segments.lengths, dim=2)[i], expected, atol=1e-4, rtol=1e-4)
    assert done.given == lengths


def test_a_kept_features_time_is_the_mean_time_of_its_frames():
    layer = layer_of(SGSConfig.from_preset("uniform", num_bins=4))
    (_,), (done,) = sample([layer], [features(2, 12)], [None])
    assert done.segments.times.tolist() == [1.0, 4.0, 7.0, 10.0] * 2
    assert done.assignment.tolist() == [[0] * 3 + [1] * 3 + [2] * 3 + [3] * 3] * 2


def test_a_frame_that_goes_nowhere_is_assigned_nowhere():
    layer = layer_of(SGSConfig.from_preset("stride", num_bins=2))
    (_,), (done,) = sample([layer], [features(1, 6)], [None])
    assert done.assignment.tolist() == [[-1, 0, -1, -1, 1, -1]]


@pytest.mark.parametrize("options", EVERY_KIND, ids=lambda o: o.similarity)
def test_the_fewest_features_that_the_trunk_can_run_on_are_always_kept(options):
    layer = layer_of(options, min_bins=3).eval()
    static = features(2, 12)
    static[0] = static[0, :, :1]
    (_,), (done,) = sample([layer], [static], [None])
    assert min(done.segments.lengths) >= 3


def test_a_clip_too_short_for_the_trunk_or_a_cap_too_low_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="SGS after 'res3': the layers behind need at least 4 features, and a clip has 3"):
        layer_of(REFERENCE, min_bins=4)(features(1, 3))
    with pytest.raises(ValueError, match="sgs.num_bins=2 is too few: the layers behind 'res3' need at least 4"):
        layer_of(replace(REFERENCE, num_bins=2), min_bins=4)(features(1, 8))


@pytest.mark.parametrize("options", [SGSConfig.from_preset("uniform", keep_ratio=0.25), replace(EQUAL, keep_ratio=0.25)], ids=lambda o: o.similarity)
def test_what_keeps_equally_many_features_keeps_its_keep_ratio_and_a_new_one_from_the_next_batch_on(options):
    layer = layer_of(options)
    assert layer(features(2, 12)).lengths.tolist() == [3, 3]
    layer.set_budget(0.75)
    assert layer(features(2, 12)).lengths.tolist() == [9, 9]


@pytest.mark.parametrize("kept", [1, 3, 8])
def test_equally_many_features_are_those_of_the_best_of_all_cuts_into_so_many(kept):
    layer = layer_of(SGSConfig(num_bins=kept, same_number=True, embed_from="features"))
    x = features(5, 8)
    x[3] *= 0.01
    proposal = layer(x)
    assert proposal.lengths.tolist() == proposal.report.tolist() == [kept] * 5
    for z, weights in zip(proposal.z.double(), proposal.weights):
        bins = torch.tensor(bins_by_trial(z, width=1.0, cost_exponent=0.0, least=kept, most=kept))
        members = (bins == torch.arange(kept)[:, None]).float()  # [B, T]
        torch.testing.assert_close(weights, members / members.sum(dim=1, keepdim=True))


def test_equally_many_features_are_kept_of_static_clips_and_all_of_shorter_ones():
    layer = layer_of(SGSConfig(num_bins=5, same_number=True))
    x = features(3, 8)
    x[0] = x[0, :, :1]
    assert layer(x).lengths.tolist() == [5, 5, 5] and layer(x[:, :, :4]).lengths.tolist() == [4, 4, 4]
    pieces, segments, _ = packed_features((8, 3, 6), 8)
    assert layer(torch.ones_like(pieces), segments).lengths.tolist() == layer(pieces, segments).lengths.tolist() == [5, 3, 5]


@pytest.mark.parametrize("options", [SGSConfig.from_preset("uniform", keep_ratio=0.5), EQUAL], ids=lambda o: o.similarity)
def test_a_layer_of_equal_numbers_behind_others_keeps_its_keep_ratio_of_what_they_kept(options):
    x, segments, _ = packed_features((4, 4), 16)
    assert layer_of(options, depth=2)(x, segments).lengths.tolist() == [2, 2]  # 16 / 2 / 2 / 2


def test_a_layer_says_that_it_keeps_equal_numbers():
    assert "same_number=True" in repr(layer_of(EQUAL)) and "same_number" not in repr(layer_of())


@pytest.mark.parametrize("before", [None, "packed"])
def test_a_nan_in_one_clip_is_refused_naming_the_layer_and_the_clip(before):
    layer = layer_of(REFERENCE)
    x, segments, _ = packed_features((6, 4, 5), 6)
    if before is None:
        x, segments = features(3, 6), None
        x[1, 2, 3] = torch.nan
    else:
        x[:, 2, 8] = torch.inf
    for mode in (True, False):
        layer.train(mode)
        with pytest.raises(NonFiniteFeatures, match="SGS after 'res3': the features of clip 1 of the batch hold a NaN"):
            sample([layer], [x], [segments])
    layer.embedding.out.weight.data.fill_(torch.nan)
    with pytest.raises(NonFiniteFeatures, match="SGS after 'res3': the similarity embedding holds a NaN"):
        sample([layer], [features()], [None])


@pytest.mark.parametrize("options", [*(SGSConfig.from_preset(name) for name in ("atfr", "uniform", "stride", "random")), SGSConfig(same_number=True)], ids=lambda o: o.similarity)
def test_a_layer_that_was_never_calibrated_is_refused_with_the_way_out_unless_it_is_forced(options):
    layer = layer_of(options)
    with pytest.raises(ValueError, match=r"SGS after 'res3' is not calibrated: call atfr.calibrate\(model, clips\)"):
        sample([layer], [features(2)], [None])
    (_,), (done,) = sample([layer], [features(2)], [None], [(2, 5)])
    assert done.segments.lengths == (2, 5)


@pytest.mark.parametrize(
    "options, fixed",
    [
        (SGSConfig.from_preset("atfr", width=0.3), "its width decides B'"),
        (REFERENCE, "its similarity=distance_to_mean, scale=relative decides B'"),
        (SGSConfig.from_preset("uniform", num_bins=4), "its num_bins decides B'"),
        (SGSConfig.from_preset("atfr", num_bins=4, same_number=True), "its num_bins decides B'"),
        (SGSConfig.from_preset("identity"), "its similarity=none, scale=relative decides B'"),
    ],
)
def test_a_layer_without_a_budget_takes_none_and_says_what_decides(options, fixed):
    layer = layer_of(options)
    with pytest.raises(ValueError, match=f"SGS after 'res3' follows no budget, since {fixed}"):
        layer.set_budget(0.5)
    assert layer.keep_ratio is None


@pytest.mark.parametrize("keep_range", [None, (0.2, 0.9)])
def test_a_layers_budget_is_saved_with_its_weights(keep_range):
    saved, loaded, never = (layer_of(SGSConfig.from_preset("atfr", gflops=0.4)) for _ in range(3))
    saved.set_budget(0.3, keep_range)
    saved.calibrate(features().mean(dim=(3, 4)).transpose(1, 2), torch.full((5,), 12))
    loaded.load_state_dict(saved.state_dict())
    assert (loaded.keep_ratio, loaded.keep_range, loaded.width) == (0.3, keep_range, saved.width)
    loaded.load_state_dict(never.state_dict())
    assert loaded.keep_ratio is loaded.keep_range is None and loaded.width.isnan()


def test_a_calibrated_path_takes_the_median_step_off_and_keeps_its_keep_ratio():
    options = SGSConfig.from_preset("frozen", similarity="path", scale="absolute", kernel="mean", noise_floor=True, keep_ratio=0.4)
    layer = layer_of(options).eval()
    clips = features(60, 12)
    proposal = layer(clips)
    layer.calibrate(proposal.z, proposal.valid)
    steps = proposal.z.diff(dim=1).norm(dim=2).flatten()
    assert layer.floor.item() == pytest.approx(steps.median().item(), rel=0.02)
    kept = layer(clips).lengths.float().mean().item()
    assert kept == pytest.approx(0.4 * 12, abs=0.3)


def test_steering_narrows_the_width_when_too_few_bins_are_kept():
    layer = layer_of()
    layer.width.fill_(1.0)
    layer.steer(torch.tensor(0.2))
    assert layer.width < 1
    layer.width.fill_(1.0)
    layer.steer(torch.tensor(0.9))
    assert layer.width > 1


def test_training_at_drawn_keep_ratios_visits_the_whole_range_and_leaves_the_width_of_evaluation_alone():
    layer = layer_of(RANGED)
    layer.set_budget(0.3, (0.2, 1.0))
    layer.width.fill_(0.5)
    clips = features(40, 12)
    kept = [layer(clips).lengths.float().mean().item() / 12 for _ in range(60)]
    assert min(kept) < 0.3 and max(kept) > 0.9 and all(0.15 < ratio <= 1 for ratio in kept)
    assert sum(kept) / len(kept) == pytest.approx(0.6, abs=0.1)
    layer.steer(torch.tensor(0.9))
    assert layer.width == 0.5
    with torch.no_grad():  # as where statistics are taken, in training mode
        counted = layer(clips).lengths
    assert counted.equal(layer.eval()(clips).lengths)


@pytest.mark.parametrize("similarity", ["partition", "anchor"])
def test_a_keep_ratio_that_the_trainer_drew_is_kept_and_costs_no_draw_of_torchs(similarity):
    layer = layer_of(replace(RANGED, similarity=similarity))
    layer.set_budget(0.3, (0.2, 1.0))
    layer.width.fill_(0.5)
    x, segments, _ = packed_features((12, 7, 12, 4) * 5, 12)
    before = torch.random.get_rng_state()
    for seed in range(3):
        ratio = np.random.default_rng(seed).uniform(0.2, 1.0)
        layer.draw(np.random.default_rng(seed))
        _, (done,) = sample([layer], [x], [segments])
        assert sum(done.segments.lengths) == pytest.approx(ratio * sum(segments.lengths), abs=1)
        assert sum(done.segments.lengths) <= ratio * sum(segments.lengths)
    assert torch.random.get_rng_state().equal(before)


@pytest.mark.parametrize("similarity", ["partition", "anchor"])
def test_a_nan_while_keep_ratios_are_drawn_is_refused_as_ever(similarity):
    layer = layer_of(replace(RANGED, similarity=similarity))
    layer.set_budget(0.3, (0.2, 1.0))
    layer.width.fill_(0.5)
    clips = features()
    clips[3, 0, 0] = torch.nan
    with pytest.raises(NonFiniteFeatures, match="clip 3"):
        sample([layer], [clips], [None])


def test_a_frozen_embedding_is_not_learned_and_a_learned_one_gets_gradients():
    for embedding, learned in (("mlp", True), ("frozen", False)):
        layer = layer_of(SGSConfig.from_preset("reference", embedding=embedding))
        (kept,), _ = sample([layer], [features().requires_grad_()], [None])
        kept.square().sum().backward()
        assert (layer.embedding.out.weight.grad is not None) == learned


def test_forced_bins_are_of_equal_size_and_refused_where_a_clip_has_not_so_many_features():
    layer, x = layer_of(), features(2, 6)
    (kept,), (done,) = sample([layer], [x], [None], [(2, 3)])
    expected = torch.cat([x[0].unflatten(1, (2, 3)).mean(dim=2), x[1].unflatten(1, (3, 2)).mean(dim=2)], dim=1)
    torch.testing.assert_close(kept[0], expected)
    assert done.segments.lengths == (2, 3)
    with pytest.raises(ValueError, match="cannot be made to keep"):
        sample([layer], [x], [None], [(2, 7)])


@pytest.mark.parametrize("metric", ["l2", "l1", "cosine", "mahalanobis"])
def test_under_autocast_the_sampling_is_the_float32_one(metric):
    layer = SGS(8, SGSConfig.from_preset("reference", metric=metric), name="res2").eval()
    x = torch.randn(4, 8, 16, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (sums,), (done,) = sample([layer], [x], [None])
    (expected,), (plain,) = sample([layer], [x], [None])
    assert done.weights.dtype == torch.float32 and done.segments.lengths == plain.segments.lengths
    torch.testing.assert_close(done.weights, plain.weights)
    torch.testing.assert_close(sums, expected)
