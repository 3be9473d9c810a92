"""Weights under PySlowFast's names, listed here in the order in which it defines its layers."""

from __future__ import annotations

import pytest
import torch
from batch_norms import spread
from source_networks import (
    assert_same_state,
    dense,
    logits,
    source_c2d,
    source_i3d,
    source_slow,
    source_slowfast,
    source_x3d,
)
from torch import nn

from atfr.models.backbones.x3d import x3d
from atfr.models.pretrained.load import load_pretrained
from atfr.models.pretrained.names import to_pytorchvideo


def bn(name):
    return [f"{name}.{kind}" for kind in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]


def native_block(name, *, shortcut, se=None):
    """resnet_helper.ResBlock; `se` is None for BottleneckTransform, else whether an X3DTransform has SE."""
    names = [f"{name}.branch1.weight", *bn(f"{name}.branch1_bn")] if shortcut else []
    names += [f"{name}.branch2.a.weight", *bn(f"{name}.branch2.a_bn"), f"{name}.branch2.b.weight", *bn(f"{name}.branch2.b_bn")]
    if se:
        names += [f"{name}.branch2.se.{fc}.{kind}" for fc in ("fc1", "fc2") for kind in ("weight", "bias")]
    return [*names, f"{name}.branch2.c.weight", *bn(f"{name}.branch2.c_bn")]


def native_stages(depths, *, pathways=1, x3d=False):
    """video_model_builder's s2 to s5, each with its fusion where there are two pathways."""
    for stage, depth in zip((2, 3, 4, 5), depths):
        for pathway in range(pathways):
            for i in range(depth):
                yield from native_block(f"s{stage}.pathway{pathway}_res{i}", shortcut=i == 0, se=i % 2 == 0 if x3d else None)
        if pathways == 2 and stage < 5:
            yield from [f"s{stage}_fuse.conv_f2s.weight", *bn(f"s{stage}_fuse.bn")]


PROJECTION = ["head.projection.weight", "head.projection.bias"]


def native_resnet(depths=(3, 4, 6, 3)):
    return ["s1.pathway0_stem.conv.weight", *bn("s1.pathway0_stem.bn"), *native_stages(depths), *PROJECTION]


def native_slowfast(depths=(1, 1, 1, 1)):
    stems = [name for p in (0, 1) for name in (f"s1.pathway{p}_stem.conv.weight", *bn(f"s1.pathway{p}_stem.bn"))]
    return [*stems, "s1_fuse.conv_f2s.weight", *bn("s1_fuse.bn"), *native_stages(depths, pathways=2), *PROJECTION]


def native_x3d(depths=(1, 2, 5, 3)):
    stem = ["s1.pathway0_stem.conv_xy.weight", "s1.pathway0_stem.conv.weight", *bn("s1.pathway0_stem.bn")]
    head = ["head.conv_5.weight", *bn("head.conv_5_bn"), "head.lin_5.weight", *PROJECTION]
    return [*stem, *native_stages(depths, x3d=True), *head]


def as_pyslowfast(network, names):
    """A PySlowFast checkpoint of pytorchvideo's network: both define their layers in the same order."""
    state = network.state_dict()
    return {"epoch": 3, "model_state": dict(zip(names, state.values(), strict=True)), "optimizer_state": {"state": {}}, "cfg": "TRAIN: {}"}


@pytest.mark.parametrize(
    "build,names",
    [
        (source_slow, native_resnet()),
        (source_c2d, native_resnet()),
        pytest.param(source_i3d, native_resnet(), marks=pytest.mark.slow),
        (source_slowfast, native_slowfast()),
    ],
)
def test_pyslowfasts_own_names_are_understood(tmp_path, build, names):
    source, network = build(), build()
    torch.save(as_pyslowfast(source, names), tmp_path / "native.pyth")
    report = load_pretrained(dense(network), tmp_path / "native.pyth")
    assert_same_state(network, source)
    assert not report.skipped and not report.new and "names of PySlowFast" in report.as_table()
    slowfast = build is source_slowfast
    assert torch.allclose(logits(network, slowfast), logits(source, slowfast), atol=1e-5)


def test_pyslowfasts_x3d_has_a_norm_that_pytorchvideos_has_not_and_gives_the_same_logits(tmp_path):
    source = source_x3d()
    # As resnet_helper.ResBlock has it: a norm on every shortcut with a stride.
    first = source.blocks[1].res_blocks[0]
    branch2 = first._modules.pop("branch2")
    first.branch1_norm = spread(nn.Sequential(nn.BatchNorm3d(first.branch1_conv.out_channels)))[0]
    first.branch2 = branch2  # behind it, as PySlowFast has it
    torch.save(as_pyslowfast(source, native_x3d()), tmp_path / "x3d.pyth")
    model = x3d(size="tiny", num_classes=5)
    report = load_pretrained(model, tmp_path / "x3d.pyth")
    assert torch.allclose(logits(model), logits(source), atol=1e-5)
    assert not report.skipped and not report.new
    assert report.notes == ("s2.pathway0_res0.branch1_bn is folded into blocks.1.res_blocks.0, which has no norm there: the same in evaluation",)


@pytest.mark.parametrize(
    "native,ours",
    [
        ("s1.pathway0_stem.conv_xy.weight", "blocks.0.conv.conv_t.weight"),
        ("s1.pathway0_stem.conv.weight", "blocks.0.conv.conv_xy.weight"),
        ("s1.pathway0_stem.bn.running_var", "blocks.0.norm.running_var"),
        ("s4.pathway0_res2.branch2.b_bn.weight", "blocks.3.res_blocks.2.branch2.norm_b.0.weight"),
        ("s4.pathway0_res2.branch2.se.fc1.bias", "blocks.3.res_blocks.2.branch2.norm_b.1.block.0.bias"),
        ("s4.pathway0_res2.branch2.se.fc2.weight", "blocks.3.res_blocks.2.branch2.norm_b.1.block.2.weight"),
        ("s3.pathway0_res0.branch1_bn.bias", "blocks.2.res_blocks.0.branch1_norm.bias"),
        ("head.conv_5_bn.weight", "blocks.5.pool.pre_norm.weight"),
        ("head.lin_5.weight", "blocks.5.pool.post_conv.weight"),
        ("head.projection.bias", "blocks.5.proj.bias"),
    ],
)
def test_names_of_x3d_written_down_from_both_libraries(native, ours):
    own = source_x3d().state_dict()
    assert ours in own and to_pytorchvideo(native_x3d(), own)[native] == ours
