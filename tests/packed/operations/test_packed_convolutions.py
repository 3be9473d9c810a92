"""Packed convolutions against torch's, run on every clip alone; and the gaps between clips."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from each_clip_alone import FORMATS, LENGTHS, check, clips_of, segments_of
from fvcore.nn.squeeze_excitation import SqueezeExcitation
from operation_cases import CONVS, Conv, identify
from torch import Tensor, nn

from atfr.models.packed import ops
from atfr.models.packed.segments import Segments

# Without padding there are clips too short for it.
UNPADDED = [Conv("gaps", (2, 1, 1), (2, 1, 1)), Conv("gaps", (3, 2, 2)), Conv("gaps", (3, 1, 1), (2, 1, 1)), Conv("gaps", (2, 3, 3), dilation=(2, 1, 1))]


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("conv", CONVS, ids=identify)
def test_a_convolution_is_that_of_each_clip(conv, memory):
    module = conv.module()
    for lengths in LENGTHS:
        uneven = len(set(lengths)) > 1
        assert ops.method_of(module, lengths) == (conv.method if uneven or conv.method == "subsample" else "batch")
        check(lambda x, segments: ops.conv3d(module, x, segments), module, lengths, memory)


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("conv", UNPADDED, ids=identify)
def test_a_convolution_without_padding_is_that_of_each_clip(conv, memory):
    module = conv.module()
    for lengths in [(4, 3, 6, 5), (3, 3), (7,), (3, 8, 3)]:
        check(lambda x, segments: ops.conv3d(module, x, segments), module, lengths, memory)
    with pytest.raises(ValueError, match="too short for"):
        segments_of((4, 1)).after(ops.window_of(module))


def with_gaps(x: Tensor, segments: Segments) -> tuple[Tensor, Segments]:
    """The same clips in rows with gaps of one place, which hold NaN."""
    parted = replace(segments, gap=1)
    spaced = x.index_select(2, parted.layout.source).index_fill(2, parted.layout.gaps, torch.nan)
    return spaced.contiguous(memory_format=torch.channels_last_3d), parted


@pytest.mark.parametrize("lengths", [(4, 1, 6, 2), (1, 7, 1, 1, 3), (6, 5, 1)])
def test_operations_that_share_gaps_give_what_each_clip_gives_alone_whatever_the_gaps_hold(lengths):
    conv, se = nn.Conv3d(4, 4, 3, padding=1, groups=4).double(), SqueezeExcitation(4, 2, is_3d=True).double()
    over_time = nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0), groups=4).double()
    x = clips_of(lengths)
    with torch.no_grad():
        alone = [se(over_time(conv(piece))) for piece in x.split(lengths, dim=2)]
        y, parted = with_gaps(x, segments_of(lengths))
        for run, module in ((ops.conv3d, conv), (ops.conv3d, over_time), (ops.squeeze_excitation, se)):
            y = run(module, y, parted)
        torch.testing.assert_close(y.index_select(2, parted.layout.kept), torch.cat(alone, dim=2), rtol=1e-10, atol=1e-10)
        means = ops.mean(y, parted, keepdim=False)
        torch.testing.assert_close(means, torch.cat([piece.mean(dim=(2, 3, 4)) for piece in alone]), rtol=1e-10, atol=1e-10)


def test_the_backward_pass_does_not_keep_the_copy_with_gaps():
    conv, lengths = nn.Conv3d(4, 4, 3, padding=1, bias=False), (4, 1, 6, 2)
    x = clips_of(lengths, dtype=torch.float32).requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        out = ops.conv3d(conv, x, segments_of(lengths))
    assert max(kept, default=0) <= conv.weight.numel(), "something as large as the features is kept"
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        out.sum().backward()


def test_plans_made_in_inference_mode_serve_training():
    conv = nn.Conv3d(4, 4, (3, 1, 1), (2, 1, 1), (1, 0, 0))
    lengths = (13, 1, 4)  # of no other test, since plans are cached
    x = clips_of(lengths, dtype=torch.float32)
    with torch.inference_mode():
        ops.conv3d(conv, x, segments_of(lengths))
    ops.conv3d(conv, x.requires_grad_(), segments_of(lengths)).sum().backward()
    assert x.grad.isfinite().all()
