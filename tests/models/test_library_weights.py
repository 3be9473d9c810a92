"""Weights of pytorchvideo and torchvision: files written from the libraries' own networks load into ours."""

from __future__ import annotations

import functools

import pytest
import torch
from pytorchvideo.models import hub
from source_networks import (
    assert_same_state,
    dense,
    logits,
    source_c2d,
    source_csn,
    source_i3d,
    source_r2plus1d,
    source_r3d,
    source_slow,
    source_slowfast,
    source_torchvision_r2plus1d,
    source_x3d,
)
from tiers import slow_but
from torchvision.models import video

from atfr.models.backbones.r2plus1d import r2plus1d
from atfr.models.backbones.resnets import i3d
from atfr.models.backbones.torchvision3d import r3d
from atfr.models.backbones.x3d import x3d
from atfr.models.pretrained.load import load_pretrained
from atfr.models.sgs.config import SGSConfig


@pytest.mark.parametrize("zipped", [True, False])
def test_a_zoo_file_of_pytorchvideo_gives_our_x3d_its_logits(tmp_path, zipped):
    source = source_x3d()
    torch.save({"model_state": source.state_dict()}, tmp_path / "zoo.pyth", _use_new_zipfile_serialization=zipped)
    model = x3d(size="tiny", num_classes=5)
    report = load_pretrained(model, tmp_path / "zoo.pyth")
    assert torch.allclose(logits(model), logits(source), atol=1e-5)
    assert not report.skipped and not report.new
    assert sum(entry.size for entry in report.loaded) == sum(v.numel() for n, v in source.state_dict().items() if "num_batches" not in n)


def plain(state):
    return state


def wrapped(state):
    return {"state_dict": {f"module.model.{name}": v for name, v in state.items()}}


SOURCES = [source_slow, source_c2d, source_i3d, source_r2plus1d, source_slowfast, source_csn, source_r3d, source_torchvision_r2plus1d]
# Each library's names once, and each wrapper.
QUICK = {(source_slowfast, plain), *((build, wrapped) for build in SOURCES[:-1])}


@pytest.mark.parametrize("build, wrap", slow_but([(build, wrap) for build in SOURCES for wrap in (plain, wrapped)], QUICK.__contains__))
def test_state_dicts_of_the_libraries_load_with_and_without_wrappers(tmp_path, build, wrap):
    source, network = build(), build()
    torch.save(wrap(source.state_dict()), tmp_path / "file")
    report = load_pretrained(dense(network), tmp_path / "file")
    assert_same_state(network, source)
    assert not report.skipped and not report.new


@pytest.mark.parametrize("build", [video.mc3_18, pytest.param(video.s3d, marks=pytest.mark.slow)])
def test_the_head_of_torchvision_is_replaced_for_another_number_of_classes(tmp_path, build):
    source, network = build(num_classes=9), build(num_classes=4)
    torch.save(source.state_dict(), tmp_path / "vision.pth")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    report = load_pretrained(dense(network), tmp_path / "vision.pth")
    head = [name for name in source.state_dict() if name.startswith(("fc.", "classifier."))]
    assert [entry.name for entry in report.new] == [f"{name}" for name in head]
    assert {(entry.name, entry.reason) for entry in report.skipped} == {(name, "head of 9 classes replaced by one of 4") for name in head}
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name] if name in head else source.state_dict()[name]), name
    assert "head of 9 classes replaced by one of 4" in report.as_table()


@pytest.mark.slow
@pytest.mark.parametrize(
    "build, source",
    [
        (functools.partial(i3d, size="R50"), hub.i3d_r50),
        (functools.partial(r2plus1d, size="R50"), hub.r2plus1d_r50),
        (functools.partial(r2plus1d, size="18"), lambda **_: video.r2plus1d_18(num_classes=400)),
        (functools.partial(r3d, size="18"), lambda **_: video.r3d_18(num_classes=400)),
    ],
    ids=["i3d R50", "r2plus1d R50", "r2plus1d 18", "r3d 18"],
)
def test_a_published_networks_file_fills_ours_with_and_without_sgs(tmp_path, build, source):
    network = source(pretrained=False)
    torch.save({"model_state": network.state_dict()}, tmp_path / "zoo.pyth")
    for sgs in (None, SGSConfig.from_preset("reference")):
        model = build(num_classes=400, sgs=sgs)
        report = load_pretrained(model, tmp_path / "zoo.pyth")
        assert_same_state(model.dense_network, network)
        assert not report.skipped and all(entry.name.startswith("sgs.") for entry in report.new)
