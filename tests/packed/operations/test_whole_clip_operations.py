"""Packed operations that need all features of a clip: squeeze-excitation, non-local blocks and means."""

from __future__ import annotations

import pytest
import torch
from each_clip_alone import FORMATS, LENGTHS, check, clips_of, each_alone, segments_of
from fvcore.nn.squeeze_excitation import SqueezeExcitation
from operation_cases import non_local
from torch import nn

from atfr.models.packed import ops


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_squeeze_excitation_is_that_of_each_clip(lengths, memory):
    module = SqueezeExcitation(4, 2, is_3d=True)
    check(lambda x, segments: ops.squeeze_excitation(module, x, segments), module, lengths, memory)


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("pool", [None, (1, 2, 2)], ids=["all", "pooled"])
@pytest.mark.parametrize("instantiation", ["softmax", "dot_product"])
def test_a_non_local_block_is_that_of_each_clip(instantiation, pool, norm, memory):
    module = non_local(instantiation, pool, norm)
    for lengths in LENGTHS:
        check(lambda x, segments: ops.non_local(module, x, segments), module, lengths, memory)


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.InstanceNorm3d(4, affine=True)], ids=["groups", "instances"])
def test_a_norm_over_a_clip_is_that_of_each_clip(norm, lengths, memory):
    check(lambda x, segments: ops.norm_of_clip(norm, x, segments), norm, lengths, memory)


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_a_maximum_is_that_of_each_clip(lengths, memory):
    x = clips_of(lengths, memory=memory).round().requires_grad_()  # with ties, among which the gradient is shared
    pool, segments = nn.AdaptiveMaxPool3d(1), segments_of(lengths)
    for found, expected in (
        (ops.global_max(pool, x, segments), torch.cat(each_alone(pool, x, lengths))),
        (ops.maximum(x, segments, keepdim=False), torch.cat([clip.amax((2, 3, 4)) for clip in x.split(lengths, dim=2)])),
        (ops.maximum(x, segments, keepdim=True), torch.cat([clip.amax((2, 3, 4), keepdim=True) for clip in x.split(lengths, dim=2)])),
    ):
        assert torch.equal(found, expected)
        upstream = torch.randn_like(expected)
        assert torch.equal(*(torch.autograd.grad(out, x, upstream)[0] for out in (found, expected)))


@pytest.mark.parametrize("norm", [nn.GroupNorm(4, 4), nn.InstanceNorm3d(4)], ids=["groups", "instances"])
def test_a_norm_of_a_clip_of_one_value_is_its_shift(norm):
    x = torch.randn(1, 4, 3, 1, 1).contiguous(memory_format=torch.channels_last_3d)
    assert ops.norm_of_clip(norm, x, segments_of((1, 2)))[:, :, 0].abs().max() < 1e-4


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_a_segment_mean_is_that_of_each_clip(lengths, memory):
    x = clips_of(lengths, memory=memory).requires_grad_()
    segments = segments_of(lengths)
    alone = torch.cat(each_alone(nn.AdaptiveAvgPool3d(1), x, lengths))
    for found, expected in (
        (ops.segment_mean(x, segments), alone),
        (ops.global_pool(nn.AdaptiveAvgPool3d(1), x, segments), alone),
        (ops.mean(x, segments, keepdim=True), alone),
        (ops.mean(x, segments, keepdim=False), alone.flatten(1)),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        upstream = torch.randn_like(expected)
        found, expected = (torch.autograd.grad(out, x, upstream, retain_graph=True)[0] for out in (found, expected))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    # Given back to each feature of its clip.
    repeated = torch.cat([mean.expand(-1, length, 1, 1) for mean, length in zip(alone, lengths)], dim=1)[None]
    torch.testing.assert_close(ops.repeat_per_feature(alone, segments), repeated)


def test_a_segment_mean_of_half_precision_is_added_in_single():
    lengths = (3000, 1)
    x = torch.ones(1, 2, 3001, 1, 1, dtype=torch.float16)  # 3000 is above what float16 can count by ones
    mean = ops.segment_mean(x, segments_of(lengths))
    assert mean.dtype == torch.float16 and mean.flatten().tolist() == [1.0] * 4
