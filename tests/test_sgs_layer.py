"""The SGS layer: what it proposes, how it sums frames into bins, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from atfr.models.packed.segments import Segments
from atfr.models.sgs.config import SGSConfig
from atfr.models.sgs.layer import SGS
from atfr.models.sgs.sampling import NonFiniteFeatures, sample

ATFR = SGSConfig.from_preset("reference", similarity="anchor", kernel="mean", scale="absolute", order="time", embedding="pooled", before_activation=False)
EVERY_KIND = [
    SGSConfig.from_preset("reference"),
    SGSConfig.from_preset("reference", similarity="magnitude", kernel="linear_normalized", edges="inclusive", order="time"),
    SGSConfig.from_preset("reference", similarity="path", kernel="delta_normalized", scale="absolute", width=2.0),
    SGSConfig.from_preset("reference", similarity="anchor", kernel="mean", scale="absolute", embedding="pooled", width=0.9),
    SGSConfig.from_preset("reference", similarity="distance_to_mean", kernel="mean", embedding="frozen"),
    *(SGSConfig.from_preset("reference", similarity=name, kernel="mean") for name in ("uniform", "stride", "random", "none")),
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
    layer = layer_of(SGSConfig.from_preset("reference", similarity="uniform", kernel="mean", num_bins=4))
    (_,), (done,) = sample([layer], [features(2, 12)], [None])
    assert done.segments.times.tolist() == [1.0, 4.0, 7.0, 10.0] * 2
    assert done.assignment.tolist() == [[0] * 3 + [1] * 3 + [2] * 3 + [3] * 3] * 2


def test_a_frame_that_goes_nowhere_is_assigned_nowhere():
    layer = layer_of(SGSConfig.from_preset("reference", similarity="stride", kernel="mean", num_bins=2))
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
    with pytest.raises(ValueError, match="SGS after 'res3': what follows needs at least 4 features, and a clip has 3"):
        layer_of(SGSConfig.from_preset("reference"), min_bins=4)(features(1, 3))
    with pytest.raises(ValueError, match="model.sgs.num_bins=2 is too few: what follows 'res3' needs at least 4"):
        layer_of(SGSConfig.from_preset("reference", num_bins=2), min_bins=4)(features(1, 8))


def test_num_bins_can_be_changed_between_batches():
    layer, x = layer_of(SGSConfig.from_preset("reference")).eval(), features()
    layer.num_bins = 3
    (_,), (done,) = sample([layer], [x], [None])
    assert max(done.segments.lengths) <= 3


def test_a_baseline_keeps_the_target_share_unless_a_number_is_given():
    (_,), (done,) = sample([layer_of(SGSConfig.from_preset("reference", similarity="uniform", kernel="mean", keep_ratio=0.25))], [features(2, 12)], [None])
    assert done.segments.lengths == (3, 3)


@pytest.mark.parametrize("before", [None, "packed"])
def test_a_nan_in_one_clip_is_refused_naming_the_layer_and_the_clip(before):
    layer = layer_of(SGSConfig.from_preset("reference"))
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


def test_a_width_that_was_never_calibrated_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="SGS after 'res3' has no bin width yet: calibrate it"):
        sample([layer_of()], [features()], [None])


def test_a_calibrated_path_takes_the_median_step_off_and_keeps_its_target():
    layer = layer_of(SGSConfig.from_preset("reference", similarity="path", scale="absolute", kernel="mean", embedding="frozen", noise_floor=True, keep_ratio=0.4)).eval()
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


def test_training_at_drawn_shares_visits_the_whole_range_and_leaves_the_width_of_evaluation_alone():
    torch.manual_seed(0)
    layer = layer_of(replace(ATFR, similarity="partition", gflops_range=(0.2, 1.0), keep_ratio=0.3))
    layer.width.fill_(0.5)
    clips = features(40, 12)
    kept = [layer(clips).lengths.float().mean().item() / 12 for _ in range(60)]
    assert min(kept) < 0.3 and max(kept) > 0.9 and all(0.15 < share <= 1 for share in kept)
    assert sum(kept) / len(kept) == pytest.approx(0.6, abs=0.1)
    layer.steer(torch.tensor(0.9))
    assert layer.width == 0.5
    with torch.no_grad():  # as where statistics are taken, in training mode
        counted = layer(clips).lengths
    assert counted.equal(layer.eval()(clips).lengths)


@pytest.mark.parametrize("similarity", ["partition", "anchor"])
def test_a_share_that_a_trainer_chose_is_kept_and_costs_no_draw(similarity):
    layer = layer_of(replace(ATFR, similarity=similarity, gflops_range=(0.2, 1.0)))
    layer.width.fill_(0.5)
    x, segments, _ = packed_features((12, 7, 12, 4) * 5, 12)
    before = torch.random.get_rng_state()
    for share in (0.25, 0.5, 0.8):
        layer.share = share
        _, (done,) = sample([layer], [x], [segments])
        assert sum(done.segments.lengths) == pytest.approx(share * sum(segments.lengths), abs=1)
        assert sum(done.segments.lengths) <= share * sum(segments.lengths)
    assert torch.random.get_rng_state().equal(before)


@pytest.mark.parametrize("similarity", ["partition", "anchor"])
def test_a_nan_while_shares_are_drawn_is_refused_as_ever(similarity):
    layer = layer_of(replace(ATFR, similarity=similarity, gflops_range=(0.2, 1.0)))
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


@pytest.mark.parametrize(
    "change,message",
    [
        ({"embedding": "cnn"}, "embedding='cnn' does not exist; choose one of mlp, pooled, frozen"),
        ({"execution": "fast"}, "execution='fast' does not exist"),
        ({"kernel": "mean"}, "kernel=mean passes no gradient to a learned embedding"),
        ({"num_bins": 0}, "num_bins must be a whole number of at least 1, not 0"),
        ({"num_bins": "4"}, "num_bins must be a whole number of at least 1, not '4'"),
        ({"num_bins": 2.5}, "num_bins must be a whole number of at least 1, not 2.5"),
        ({"width": 0.5}, "width is one bin width for all clips, which scale=relative has not"),
        ({"scale": "absolute", "width": -1.0}, "width must be above 0, not -1.0"),
        ({"similarity": "uniform", "kernel": "mean", "scale": "absolute"}, "set scale=relative"),
        ({"noise_floor": True}, "noise_floor is taken off the steps of similarity=path"),
        ({"gflops_range": [0.5]}, r"drawn=\[0.5\] must be the least and the greatest share"),
        ({"gflops_range": [0.0, 1.0]}, "must be the least and the greatest share"),
        ({"gflops_range": [0.2, 1.0]}, "drawn chooses the width of each training batch: set scale=absolute"),
        ({"keep_ratio": 0.0}, "target is a share of the frames"),
        ({"after": []}, "after is empty"),
        ({"after": 3}, "after=3 must be the name of a stage, the path of a module, or a list of these"),
        ({"after": ["res2", 3]}, "after=.'res2', 3. must be the name of a stage"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        SGSConfig.from_preset("reference", **change)
