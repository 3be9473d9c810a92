"""Packed execution: every clip as if it were alone, and the dense network untouched."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import pytest
import torch
from outcomes import run
from pytorchvideo.models.x3d import create_x3d
from tiers import slow_but
from torch import nn
from toy_network import Flip, Toy
from uneven_clips import TOLERANCE, lively, uneven_clips

from atfr.models.backbones.resnets import slow
from atfr.models.backbones.x3d import SIZES, STAGES, x3d
from atfr.models.packed.ops import conv3d, segment_mean
from atfr.models.packed.segments import Segments
from atfr.models.sgs.config import SGSConfig
from atfr.models.video_net import VideoNet

ATFR = SGSConfig.from_preset("atfr", width=0.3)
REFERENCE = SGSConfig.from_preset("reference")
FEATURES = replace(ATFR, embed_from="features")
ANCHOR = replace(FEATURES, similarity="anchor")
OPTIONS = {"atfr": ATFR, "embeds features": FEATURES, "anchor": ANCHOR, "reference": REFERENCE, "cosine": replace(REFERENCE, metric="cosine")}
ANYWHERE = [("atfr", stage) for stage in STAGES] + [(name, stage) for name in ("embeds features", "anchor", "reference", "cosine") for stage in ("stem", "res2")]


def segments_of(lengths):
    return Segments(lengths, max(lengths), torch.zeros(sum(lengths)))


@pytest.mark.parametrize("options, after", slow_but(ANYWHERE, lambda place: place[0] in ("atfr", "reference") or place == ("embeds features", "res2")))
def test_a_clip_has_the_same_logits_alone_and_in_any_batch(options, after):
    model = lively(x3d(size="tiny", num_classes=6, sgs=replace(OPTIONS[options], after=after))).eval()
    clips = uneven_clips(16)
    with torch.no_grad():
        alone = [run(model, clip[None]) for clip in clips]
        assert len({a.bins[0] for a in alone}) > 2
        for _ in range(8):
            chosen = random.sample(range(16), random.randint(2, 12))
            batch = run(model, clips[chosen])
            assert batch.bins == [alone[i].bins[0] for i in chosen]
            expected = torch.cat([alone[i].logits for i in chosen])
            torch.testing.assert_close(batch.logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("options", slow_but(OPTIONS, ("atfr", "reference").__contains__))
def test_gradients_of_a_batch_are_the_sum_of_those_of_its_clips(options):
    model = lively(x3d(size="tiny", num_classes=6, sgs=OPTIONS[options])).eval().double()
    clips = uneven_clips(5).double()
    model(clips).square().sum().backward()
    batched = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for clip in clips:
        model(clip[None]).square().sum().backward()
    assert {name for name, _ in model.named_parameters() if not name.startswith("sgs.")} <= batched.keys()
    for name, gradient in batched.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("size", ["tiny", "S"])
def test_without_sgs_the_logits_are_those_of_pytorchvideos_own_network(size):
    variant = SIZES[size]
    frames, crop = (16, 48) if size == "tiny" else (13, 96)
    theirs = lively(
        create_x3d(
            input_clip_length=frames,
            input_crop_size=crop,
            model_num_class=6,
            width_factor=variant.width_factor,
            depth_factor=variant.depth_factor,
            head_activation=None,
        ),
        frames,
        crop,
    )
    ours = x3d(size=size, num_classes=6).eval()
    ours.dense_network.load_state_dict(theirs.state_dict())
    clips = torch.randn(2, 3, frames, crop, crop)
    with torch.no_grad():
        torch.testing.assert_close(ours(clips), theirs(clips), atol=1e-5, rtol=1e-5)


def test_where_every_frame_is_kept_the_network_is_the_dense_one():
    model = lively(x3d(size="tiny", num_classes=6, sgs=replace(ATFR, width=1e-6))).eval()
    clips = torch.randn(2, 3, 16, 32, 32)
    with torch.no_grad():
        prediction = run(model, clips)
        assert prediction.bins == [(16,), (16,)]
        torch.testing.assert_close(prediction.logits, model.dense_network(clips), atol=1e-5, rtol=1e-5)


def test_a_copy_of_a_network_is_independent_of_it():
    model = x3d(size="tiny", num_classes=6, sgs=ATFR).eval()
    clips = uneven_clips(2)
    with torch.no_grad():
        before = model(clips)
        copied = copy.deepcopy(model)
        for parameter in copied.parameters():
            parameter.zero_()
        torch.testing.assert_close(model(clips), before)
        assert not copied(clips).any()


def test_a_network_can_be_trained_after_it_was_used_in_inference_mode():
    model = x3d(size="tiny", num_classes=6, sgs=ATFR)
    clips = uneven_clips(3)
    with torch.inference_mode():
        model(clips)
    model(clips).sum().backward()


@pytest.mark.parametrize("dilation", [1, 2])
def test_a_packed_convolution_equals_one_convolution_a_clip(dilation):
    conv = nn.Conv3d(3, 4, (3, 1, 3), padding=(dilation, 0, 1), dilation=(dilation, 1, 1))
    lengths = (4, 1, 6, 2)
    x = torch.randn(1, 3, sum(lengths), 5, 5)
    expected = torch.cat([conv(piece) for piece in x.split(lengths, dim=2)], dim=2)
    torch.testing.assert_close(conv3d(conv, x, segments_of(lengths)), expected)


def test_a_segment_mean_equals_the_mean_of_each_clip():
    lengths = (4, 1, 6)
    x = torch.randn(1, 3, sum(lengths), 5, 5)
    expected = torch.cat([piece.mean(dim=(2, 3, 4), keepdim=True) for piece in x.split(lengths, dim=2)])
    torch.testing.assert_close(segment_mean(x, segments_of(lengths)), expected)


def test_a_clip_without_features_is_refused():
    with pytest.raises(ValueError, match="at least one feature"):
        segments_of((3, 0))


@pytest.mark.parametrize(
    "second,message",
    [
        (nn.AdaptiveAvgPool3d(2), "second behind SGS has no packed form: AdaptiveAvgPool3d"),
        (nn.MaxPool3d((2, 1, 1), ceil_mode=True), "a pool in time with ceil_mode"),
        (nn.AvgPool3d((3, 1, 1), 1, (1, 0, 0), count_include_pad=False), "an average in time that leaves its padding out"),
        (nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0), padding_mode="circular"), "pads in time with circular"),
        (nn.LocalResponseNorm(2), "second behind SGS has no packed form: LocalResponseNorm"),
        (Flip(), "'flip' .* has no packed form"),
    ],
)
def test_what_may_mix_clips_is_refused_by_name(second, message):
    with pytest.raises(ValueError, match=message):
        VideoNet(Toy(second), stages={"first": "first"}, sgs=replace(ATFR, after="first", execution="packed"))


def test_a_connection_that_by_passes_the_cut_is_refused():
    class Bypass(Toy):
        def forward(self, x):
            early = self.first(x)
            return self.pool(self.second(early) + early).flatten(1)

    with pytest.raises(ValueError, match="'add' also needs 'first' from before it"):
        VideoNet(Bypass(nn.ReLU()), stages={"s": "second"}, sgs=replace(ATFR, after="s"))


def test_an_unknown_stage_or_size_is_refused_with_what_is_possible():
    with pytest.raises(ValueError, match="after='res9' is not a stage .* stem, res2, res3, res4, res5"):
        x3d(size="tiny", num_classes=6, sgs=replace(ATFR, after="res9"))
    with pytest.raises(ValueError, match="size='XXL' is not a size of x3d; choose one of tiny, XS"):
        x3d(size="XXL", num_classes=6)


def test_clips_of_another_shape_or_on_another_device_are_refused():
    model = x3d(size="tiny", num_classes=6)
    with pytest.raises(ValueError, match=r"clips must be \[N, 3, T, H, W\] on cpu, like the network, not \[3, 16, 32, 32\] on cpu"):
        model(torch.zeros(3, 16, 32, 32))
    with pytest.raises(ValueError, match="on cpu, like the network, not .* on meta"):
        model(torch.zeros(1, 3, 16, 32, 32, device="meta"))


@pytest.mark.parametrize("build, size, after, reach", [pytest.param(slow, "R50", "res2", 0, id="slow", marks=pytest.mark.slow), pytest.param(x3d, "tiny", "stem", 2, id="x3d")])
@pytest.mark.parametrize("similarity", ["partition", "anchor"])
def test_features_of_a_static_clip_are_one_but_for_those_near_enough_to_its_ends_to_see_the_padding(build, size, after, reach, similarity):
    sgs = SGSConfig.from_preset("atfr", after=after, embed_from="features", keep_ratio=0.4, similarity=similarity)
    model = build(size=size, num_classes=6, sgs=sgs).eval()
    layer, clips = model.sgs[after], uneven_clips(8)
    static = clips[:, :, :1].expand(-1, -1, 16, -1, -1)
    with torch.no_grad():
        layer.width.fill_(1.0)
        (seen,) = run(model, clips).layers
        layer.calibrate(seen.proposal.z, seen.proposal.valid)
        assert sum(run(model, clips).layers[0].segments.lengths) > 8 * 5
        (done,) = run(model, static).layers
    inside = done.assignment[:, reach : 16 - reach]
    assert (inside == inside[:, :1]).all()
    assert max(done.segments.lengths) <= 1 + 2 * reach
