"""The options of an SGS layer: presets, budgets, and what contradicts itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from atfr.models.sgs.config import PRESETS, UNUSED, SGSConfig


def test_the_defaults_are_the_preset_atfr():
    assert SGSConfig() == PRESETS["atfr"] == SGSConfig.from_preset("atfr")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_built_again_from_the_options_that_it_uses(preset):
    options = PRESETS[preset].used_options()
    assert SGSConfig(**options) == SGSConfig.from_preset(preset, **options) == PRESETS[preset]
    assert all(name in options or getattr(PRESETS[preset], name) == UNUSED[name] for name in UNUSED)


def test_options_name_the_kernel_of_contiguous_bins_only_where_it_is_not_the_mean():
    """So that run folders from before there was a choice can be resumed."""
    assert "kernel" not in PRESETS["atfr"].used_options()
    assert SGSConfig.from_preset("atfr", kernel="middle").used_options()["kernel"] == "middle"


def test_configs_that_sample_alike_are_equal():
    assert SGSConfig.from_preset("reference") == replace(PRESETS["reference"], cost_exponent=0.7, grid=2, width=None, noise_floor=False)
    assert SGSConfig(similarity="uniform", metric="cosine", embedding_dim=3) == SGSConfig.from_preset("uniform")
    assert SGSConfig(width=0.5, gflops=0.3) == SGSConfig(width=0.5, gflops=0.8)
    assert SGSConfig(width=0.5) != SGSConfig(width=0.6)


@pytest.mark.parametrize("preset", ["atfr", "uniform", "stride", "random"])
def test_a_budget_given_replaces_the_presets_kind_of_budget(preset):
    assert PRESETS[preset].gflops == 0.5 and PRESETS[preset].follows_budget
    by_ratio = SGSConfig.from_preset(preset, keep_ratio=0.3)
    assert (by_ratio.gflops, by_ratio.keep_ratio) == (None, 0.3) and by_ratio.follows_budget
    by_gflops = SGSConfig.from_preset(preset, gflops=0.3)
    assert (by_gflops.gflops, by_gflops.keep_ratio) == (0.3, None) and by_gflops.follows_budget


@pytest.mark.parametrize(
    "options",
    [{"similarity": "none"}, {"similarity": "uniform", "num_bins": 4}, {"width": 0.4}, PRESETS["reference"].used_options()],
    ids=["none", "num_bins", "width", "relative"],
)
def test_without_a_budget_to_follow_there_is_none(options):
    config = SGSConfig(**options)
    assert not config.follows_budget and config.gflops is config.keep_ratio is config.gflops_range is None


def test_locations_are_the_names_of_after():
    assert SGSConfig(after="res2").locations == ("res2",)
    assert SGSConfig(after=["stem", "layer2.0"]).locations == ("stem", "layer2.0")


@pytest.mark.parametrize("preset", ["uniform", "stride", "random", "identity"])
def test_a_baseline_embeds_no_clip(preset):
    assert PRESETS[preset].is_baseline and not PRESETS[preset].embeds_clip
    assert PRESETS["atfr"].embeds_clip and not PRESETS["atfr"].is_baseline


@pytest.mark.parametrize(
    "preset, options, message",
    [
        ("mean", {}, "sgs preset 'mean' does not exist; choose one of atfr, glance, reference, frozen, identity, uniform, stride, random"),
        ("atfr", {"target": 0.5}, "sgs has no option 'target'; choose from after, before_activation, gflops"),
        ("atfr", {"gflops": 0.5, "keep_ratio": 0.4}, "sgs gflops and keep_ratio are both given: set one of them"),
        ("atfr", {"keep_ratio": 0.5, "width": 0.4}, "sgs keep_ratio and width are both given"),
        ("reference", {"gflops": 0.4}, "sgs gflops=0.4 has no effect with similarity=distance_to_mean, scale=relative; remove it"),
        ("uniform", {"num_bins": 4, "keep_ratio": 0.3}, "sgs keep_ratio=0.3 has no effect with similarity=uniform, num_bins=4; remove it"),
        ("uniform", {"metric": "cosine"}, "sgs metric='cosine' has no effect with similarity=uniform; remove it"),
        ("atfr", {"same_number": True, "width": 0.5}, "sgs width=0.5 has no effect with similarity=partition, scale=absolute, same_number=True; remove it"),
        ("atfr", {"same_number": True, "gflops_range": [0.3, 1.0]}, "gflops_range=.* has no effect with similarity=partition, scale=absolute, same_number=True"),
        ("atfr", {"same_number": True, "num_bins": 4, "gflops": 0.5}, "sgs gflops=0.5 has no effect with similarity=partition, scale=absolute, num_bins=4, same_number=True; remove it"),
        ("atfr", {"same_number": True, "similarity": "anchor"}, "sgs same_number=True has no effect with similarity=anchor, scale=absolute; remove it"),
        ("reference", {"same_number": True}, "sgs same_number=True has no effect with similarity=distance_to_mean, scale=relative"),
        ("atfr", {"embedding_dim": 16}, "sgs embedding_dim=16 has no effect with similarity=partition, scale=absolute; remove it"),
    ],
)
def test_what_a_preset_does_not_take_is_refused_by_name(preset, options, message):
    with pytest.raises(ValueError, match=message):
        SGSConfig.from_preset(preset, **options)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"embedding": "cnn"}, "embedding='cnn' does not exist; choose one of pooled, glance, mlp, frozen"),
        ({"embed_from": "frames"}, "embed_from='frames' does not exist; choose one of features, clip"),
        ({"execution": "fast"}, "execution='fast' does not exist"),
        ({"kernel": "mean"}, "kernel=mean passes no gradient to embedding=mlp"),
        ({"same_number": "False"}, "same_number must be True or False, not 'False'"),
        ({"num_bins": 0}, "num_bins must be a whole number of at least 1, not 0"),
        ({"num_bins": "4"}, "num_bins must be a whole number of at least 1, not '4'"),
        ({"num_bins": 2.5}, "num_bins must be a whole number of at least 1, not 2.5"),
        ({"embedding_dim": 0}, r"embedding_dim \(0\) and grid \(4\) must be at least 1"),
        ({"width": 0.5}, "width is one bin width for all clips, which scale=relative does not have: set scale=absolute"),
        ({"scale": "absolute", "width": -1.0}, "width must be above 0, not -1.0"),
        ({"noise_floor": True}, "noise_floor is subtracted from the steps of similarity=path, not of distance_to_mean"),
        ({"cost_exponent": 2.0}, "cost_exponent=2.0 must be from 0 to 1"),
        ({"gflops_range": [0.5]}, r"gflops_range=\[0.5\] must be the smallest and the largest share of the dense GFLOPs"),
        ({"gflops_range": [0.0, 1.0]}, "must be the smallest and the largest share"),
        ({"gflops_range": [0.2, 1.0]}, "gflops_range chooses the bin width of each training batch: set scale=absolute and width=null"),
        ({"keep_ratio": 0.0}, "keep_ratio is a share of the frames, above 0 and at most 1, not 0.0"),
        ({"gflops": 1.5}, "gflops is a share of the dense network's GFLOPs, above 0 and at most 1, not 1.5"),
        ({"after": []}, "after is empty"),
        ({"after": 3}, "after=3 must be the name of a stage, the path of a module, or a list of these"),
        ({"after": ["res2", 3]}, "after=.'res2', 3. must be the name of a stage"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        SGSConfig.from_preset("reference", **change)


def test_a_width_beside_equal_numbers_leaves_the_budget_that_is_given():
    config = SGSConfig(same_number=True, width=0.5, keep_ratio=0.3)
    assert (config.keep_ratio, config.gflops, config.width) == (0.3, None, None)


def test_equal_numbers_that_a_similarity_does_not_have_change_nothing_else():
    assert SGSConfig(similarity="anchor", width=0.5, same_number=True) == SGSConfig(similarity="anchor", width=0.5)
