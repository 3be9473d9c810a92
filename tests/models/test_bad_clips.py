"""Clips that a network cannot run on, and networks that are not where their clips are: one clear error each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from outcomes import run
from run_tools import run_tool, small_job
from torch import Tensor, nn
from toy_network import Toy

from atfr.models.backbones.resnets import c2d, i3d
from atfr.models.backbones.torchvision3d import s3d
from atfr.models.backbones.x3d import x3d
from atfr.models.sgs.config import SGSConfig
from atfr.models.sgs.sampling import NonFiniteFeatures
from atfr.models.video_net import VideoNet

ATFR = SGSConfig.from_preset("atfr", width=0.3)
REFERENCE = SGSConfig.from_preset("reference")


def sampled(after: str) -> SGSConfig:
    return replace(ATFR, after=after)


@pytest.mark.parametrize(
    "build, size, after, frames, least",
    [
        (c2d, "R50", None, 1, 2),
        (i3d, "R50", "res5", 1, 2),
        (s3d, "base", None, 8, 13),
    ],
)
def test_a_clip_shorter_than_what_comes_before_or_without_sgs_can_run_on_is_refused_with_the_least(build, size, after, frames, least):
    model = build(size=size, num_classes=2, sgs=sampled(after) if after else None).eval()
    with torch.no_grad():
        with pytest.raises(ValueError, match=f"clips of {frames} frames are too short for this network, which needs at least {least}$"):
            model(torch.zeros(1, 3, frames, 32, 32))
        assert model(torch.zeros(1, 3, least, 32, 32)).shape == (1, 2)


def test_a_clip_too_short_for_what_follows_a_layer_is_refused_there():
    model = s3d(size="base", num_classes=2, sgs=sampled("res5")).eval()
    with pytest.raises(ValueError, match="SGS after 'res5': the layers behind need at least 2 features, and a clip has 1"):
        model(torch.zeros(1, 3, 12, 32, 32))


def test_frames_that_are_too_small_are_said_to_be_and_leave_the_running_statistics_alone():
    model = VideoNet(Toy(nn.Sequential(nn.BatchNorm3d(8), nn.Conv3d(8, 8, (1, 5, 5)))), stages={}, sgs=None)
    with pytest.raises(ValueError, match=r"this network cannot run on clips of 4 frames of 3 x 3 pixels: .*Kernel size"):
        model.check_clip(4, 3, 3)
    model.check_clip(4, 5, 5)
    assert model.dense_network.second[0].num_batches_tracked == 0 and model.training


def test_a_network_that_looks_at_values_is_tried_with_values():
    class Looking(Toy):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x.mean().item()

    model = VideoNet(Looking(nn.MaxPool3d((2, 1, 1))), stages={}, sgs=None)
    model.check_clip(2, 4, 4)
    with pytest.raises(ValueError, match="cannot run on clips of 1 frames"):
        model.check_clip(1, 4, 4)


def test_an_error_that_has_another_reason_stays_what_it_is():
    class Broken(Toy):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 1e6:
                raise RuntimeError("something else")
            return super().forward(x)

    with pytest.raises(RuntimeError, match="something else"):
        VideoNet(Broken(nn.Identity()), stages={}, sgs=None)(torch.full((1, 3, 4, 64, 64), 1e6))


@pytest.mark.parametrize("model, frames, least", [pytest.param("i3d_sgs", 1, 2, marks=pytest.mark.slow), ("s3d_sgs", 8, 13)])
def test_the_tools_refuse_a_clip_that_is_too_short_with_its_key(model, frames, least):
    outcome = run_tool("flops", f"model={model}", f"dataset.clip.frames={frames}")
    assert outcome.code == 1
    assert outcome.err.strip().splitlines()[-1].startswith(f"error: dataset.clip.frames={frames}, ") and f"needs at least {least}" in outcome.err


def test_a_training_with_clips_that_are_too_short_leaves_no_run_folder(small_videos, tmp_path):
    outcome = run_tool("train", *small_job(small_videos, tmp_path / "run", "model=i3d_sgs", "model.size=R50", "dataset.clip.frames=1"))
    assert outcome.code == 1 and "clips of 1 frames are too short for this network, which needs at least 2" in outcome.err
    assert not (tmp_path / "run").exists()


def test_a_network_of_which_a_part_lies_on_another_device_than_the_clips_is_refused_naming_the_part():
    clips = torch.zeros(2, 3, 16, 32, 32)
    for sgs, part in ((None, "blocks.2"), (sampled("res2"), "blocks.0"), (sampled("res2"), "blocks.3")):
        model = x3d(size="tiny", num_classes=2, sgs=sgs).eval()
        first = next(name for name, _ in model.named_parameters())
        model.get_submodule(part).to("meta")
        where, message = ("meta", "blocks.1.* on cpu") if part.endswith("0") else ("cpu", f"{first} on cpu")
        with pytest.raises(ValueError, match=f"parts of the network lie on different devices, .*{message}.*move all of it with model.to"):
            model(clips.to(where))
    with pytest.raises(ValueError, match="like the network, not .* on meta"):
        x3d(size="tiny", num_classes=2)(clips.to("meta"))


@pytest.mark.parametrize(
    "after, found",
    [("blocks.5", r"\[1, 6\]"), ("blocks.5.pool", r"\[1, 2048, 1, 1, 1\]"), ("blocks.5.pool.pool", r"\[1, .*, 1, 1, 1\]"), ("blocks.5.proj", r"\[1, 1, 1, 1, 6\]")],
)
def test_a_place_without_features_in_time_is_refused_with_what_it_gives(after, found):
    with pytest.raises(ValueError, match=rf"after='{after}' gives {found} for a clip of \(16, 64, 64\): SGS needs .* with more than one feature in time"):
        x3d(size="tiny", num_classes=6, sgs=sampled(after))


@pytest.mark.parametrize("options", [REFERENCE, ATFR], ids=["mlp", "pooled"])
def test_a_layer_on_another_device_than_its_features_is_refused(options):
    model = x3d(size="tiny", num_classes=2, sgs=replace(options, after="res2")).eval()
    model.sgs["res2"].to("meta")
    with pytest.raises(ValueError, match="SGS after 'res2': .* is on meta and the features are on cpu"):
        model(torch.zeros(2, 3, 16, 32, 32))


@pytest.mark.parametrize(
    "clips, found",
    [
        (torch.zeros(0, 3, 16, 32, 32), r"torch.float32 \[0, 3, 16, 32, 32\]"),
        (torch.zeros(1, 3, 16, 32, 32, dtype=torch.uint8), r"torch.uint8 \[1, 3"),
        (torch.zeros(1, 4, 16, 32, 32), r"torch.float32 \[1, 4"),
    ],
    ids=["no clip", "bytes", "four channels"],
)
@pytest.mark.parametrize("sgs", [None, sampled("res2")], ids=["dense", "sampled"])
def test_what_is_no_batch_of_normalised_clips_is_refused(clips, found, sgs):
    with pytest.raises(ValueError, match=rf"clips must be floating point \[N, 3, T, H, W\] with at least one clip, not {found}"):
        x3d(size="tiny", num_classes=2, sgs=sgs)(clips)


@pytest.mark.parametrize("preset, options", [("uniform", {"keep_ratio": 0.5}), ("stride", {"num_bins": 5}), ("random", {"num_bins": 5}), ("identity", {})])
@pytest.mark.parametrize("after", ["res2", ["stem", "res3"]])
def test_a_clip_that_is_not_finite_is_refused_by_the_baselines_too(preset, options, after):
    sgs = SGSConfig.from_preset(preset, after=after, **options)
    model = x3d(size="tiny", num_classes=2, sgs=sgs).eval()
    clips = torch.randn(3, 3, 16, 32, 32)
    model(clips)
    for value in (torch.nan, torch.inf, -torch.inf):
        clips[1, 2, 5, 7, 7] = value
        with pytest.raises(NonFiniteFeatures, match="SGS after '(res2|stem)': the features of clip 1 of the batch hold a NaN or an infinity"):
            model(clips)


@pytest.mark.parametrize("options", [REFERENCE, ATFR], ids=["mlp", "pooled"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_in_half_precision_samples_with_a_layer_in_single_precision(dtype, options):
    model = x3d(size="tiny", num_classes=2, sgs=replace(options, after="stem", before_activation=False)).eval()
    layer, clips = model.sgs["stem"], torch.randn(2, 3, 16, 32, 32).cumsum(dim=2) / 4
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    model.to(dtype)
    assert model.dense_network.blocks[0].norm.weight.dtype == dtype
    for name, tensor in layer.state_dict().items():
        assert tensor.equal(before[name]) and (tensor.dtype in (torch.float32, torch.int64) or name == "_extra_state"), name
    with torch.no_grad():
        prediction = run(model, clips.to(dtype))
        features, *clip = (x.float() for x in model.run_stem(clips.to(dtype).contiguous(memory_format=torch.channels_last_3d)))
        expected = layer(features, None, *clip)
    assert prediction.logits.dtype == dtype and prediction.logits.isfinite().all()
    assert prediction.bins == [(b,) for b in expected.lengths.tolist()]
    moved = layer.double().float().to("meta").state_dict()
    assert moved.keys() == before.keys() and all(tensor.is_meta for name, tensor in moved.items() if name != "_extra_state")
