"""Weights of this project's own checkpoints, for networks with and without SGS."""

from __future__ import annotations

import torch
from source_networks import (
    assert_same_state,
    dense,
    source_x3d,
)

from atfr.engine.run import checkpoint
from atfr.models.backbones.x3d import x3d
from atfr.models.pretrained.load import load_pretrained
from atfr.models.sgs.config import SGSConfig


def save_own(model, path):
    checkpoint.save({"model": model.state_dict(), "config": {}, "choices": {}, "class_names": ["a"]}, path)


def sampled(**options):
    return x3d(size="tiny", num_classes=5, sgs=SGSConfig.from_preset("reference", **options))


def with_width(**options):
    return sampled(similarity="anchor", scale="absolute", kernel="mean", embedding="pooled", **options)


def test_our_checkpoints_go_from_the_dense_network_to_one_that_samples_and_back(tmp_path):
    source = dense(source_x3d())
    save_own(source, tmp_path / "dense.pt")
    model = sampled()
    report = load_pretrained(model, tmp_path / "dense.pt")
    assert_same_state(model.dense_network, source.dense_network)
    assert not report.skipped and report.new and all(entry.name.startswith("sgs.") for entry in report.new)

    save_own(model, tmp_path / "sampled.pt")
    back = x3d(size="tiny", num_classes=5)
    report = load_pretrained(back, tmp_path / "sampled.pt")
    assert_same_state(back.dense_network, source.dense_network)
    assert not report.new and {entry.reason for entry in report.skipped} == {"this network does not sample"}

    other = sampled()
    report = load_pretrained(other, tmp_path / "sampled.pt")
    assert_same_state(other, model)
    assert not report.new and not report.skipped and "a checkpoint of this project" in report.as_table()


def test_a_sampling_layer_that_fits_in_part_stays_new(tmp_path):
    save_own(sampled(), tmp_path / "sampled.pt")
    other = sampled(embedding_dim=4)
    before = {name: value.clone() for name, value in other.sgs.state_dict().items()}
    report = load_pretrained(other, tmp_path / "sampled.pt")
    assert before and all(torch.equal(value, before[name]) for name, value in other.sgs.state_dict().items())
    reasons = {entry.name: entry.reason for entry in report.skipped}
    assert reasons["sgs.res2.embedding.out.weight"].startswith("shape [8, ")
    assert reasons["sgs.res2.embedding.hidden.weight"] == "not loaded without the tensors beside it, which do not fit"


def test_a_layer_that_keeps_equally_many_features_takes_the_weights_of_one_that_adapts_and_back(tmp_path):
    adaptive, equal = (x3d(size="tiny", num_classes=5, sgs=SGSConfig(same_number=value)) for value in (False, True))
    for source, other in ((adaptive, equal), (equal, adaptive)):
        save_own(source, tmp_path / "other.pt")
        report = load_pretrained(other, tmp_path / "other.pt")
        assert_same_state(other.dense_network, source.dense_network)
        assert {entry.name for entry in (*report.skipped, *report.new)} == {"sgs.stem.width"}


def test_a_width_is_taken_over_unless_it_is_set(tmp_path):
    model, tracking, fixed = with_width(), with_width(), with_width(width=0.75)
    model.sgs["res2"].width.fill_(0.25)
    save_own(model, tmp_path / "sampled.pt")
    assert not load_pretrained(tracking, tmp_path / "sampled.pt").skipped
    assert tracking.sgs["res2"].width == 0.25
    report = load_pretrained(fixed, tmp_path / "sampled.pt")
    assert fixed.sgs["res2"].width == 0.75
    assert [(entry.name, entry.reason) for entry in report.skipped] == [("sgs.res2.width", "sgs.width is set")] and not report.new
