"""SlowFast's fusion of packed pathways against its rules, applied to each clip alone."""

from __future__ import annotations

import pytest
import torch
from plain_execution import RULES, average
from torch import nn

from atfr.models.backbones.slowfast import FUSION_RULES, SIZES, Fusion
from atfr.models.packed.segments import Segments


def fusion_of(rule: str, size: str) -> Fusion:
    conv = nn.Conv3d(4, 8, (SIZES[size].fusion_kernel, 1, 1), (SIZES[size].alpha, 1, 1), (SIZES[size].fusion_kernel // 2, 0, 0), bias=False)
    norm = lively_norm(nn.BatchNorm3d(8))
    source = nn.Module()
    source.conv_fast_to_slow, source.norm, source.activation = conv, norm, nn.ReLU()
    return Fusion(source, rule=rule).double().eval()


def lively_norm(norm: nn.BatchNorm3d) -> nn.BatchNorm3d:
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)  # so that a zero is not what the convolution makes of zeros
    norm.running_mean.normal_()
    return norm


def kept_of(frames: int, lengths: tuple[int, ...]) -> Segments:
    times = [average(torch.arange(float(frames)), 0, length) for length in lengths]
    return Segments(lengths, frames, torch.cat(times))


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last_3d], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("size", ["4x16-R50", "8x8-R50"])
@pytest.mark.parametrize("rule", FUSION_RULES)
def test_the_fusion_of_packed_pathways_is_that_of_each_clip(rule, size, memory):
    fusion, alpha = fusion_of(rule, size), SIZES[size].alpha
    for slow_lengths, fast_lengths in [
        ((8, 1, 3, 8, 1, 5), (8 * alpha, 1, 2 * alpha + 3, 1, 8 * alpha, alpha)),
        ((1, 1), (2, 5)),
        ((4, 4, 4), (alpha, alpha, alpha)),
        ((3,), (7,)),
    ]:
        slow_kept, fast_kept = kept_of(8, slow_lengths), kept_of(8 * alpha, fast_lengths)
        slow, fast = (
            torch.randn(1, c, sum(lengths), 3, 3, dtype=torch.float64).contiguous(memory_format=memory).requires_grad_()
            for c, lengths in ((6, slow_lengths), (4, fast_lengths))
        )
        pieces = [
            RULES[rule](fusion, *clip)
            for clip in zip(slow.split(slow_lengths, 2), fast.split(fast_lengths, 2), slow_kept.times.split(slow_lengths), fast_kept.times.split(fast_lengths))
        ]
        out, segments = fusion.packed_forward((slow, slow_kept), (fast, fast_kept))
        assert segments.lengths == tuple(piece.shape[2] for piece in pieces) and segments.frames == 8
        expected = torch.cat(pieces, dim=2)
        torch.testing.assert_close(out, expected)
        upstream = torch.randn_like(expected)
        inputs = (slow, fast, fusion.conv_fast_to_slow.weight)
        for found, wanted in zip(torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("size", ["4x16-R50", "8x8-R50"])
def test_both_rules_are_the_dense_fusion_where_all_is_kept(size):
    alpha = SIZES[size].alpha
    slow, fast = torch.randn(3, 6, 4, 3, 3, dtype=torch.float64), torch.randn(3, 4, 4 * alpha, 3, 3, dtype=torch.float64)
    for rule in FUSION_RULES:
        fusion = fusion_of(rule, size)
        packed = [(torch.cat(list(x), dim=1)[None], Segments.whole(3, x.shape[2], x.device)) for x in (slow, fast)]
        out, segments = fusion.packed_forward(*packed)
        assert segments.lengths == (4, 4, 4)
        torch.testing.assert_close(out, torch.cat(list(fusion(slow, fast)), dim=1)[None])


@pytest.mark.parametrize("rule", FUSION_RULES)
def test_what_is_not_finite_in_a_clip_reaches_no_other_through_the_fusion(rule):
    fusion = fusion_of(rule, "8x8-R50")
    slow_lengths, fast_lengths = (3, 1, 2), (2, 9, 1)
    for spoilt in range(3):
        slow, fast = torch.randn(1, 6, 6, 3, 3, dtype=torch.float64), torch.randn(1, 4, 12, 3, 3, dtype=torch.float64)
        slow.split(slow_lengths, 2)[spoilt].fill_(torch.nan)
        fast.split(fast_lengths, 2)[spoilt].fill_(torch.nan)
        out, segments = fusion.packed_forward((slow, kept_of(8, slow_lengths)), (fast, kept_of(32, fast_lengths)))
        finite = [piece.isfinite().all().item() for piece in out.split(segments.lengths, 2)]
        assert finite == [i != spoilt for i in range(3)]
