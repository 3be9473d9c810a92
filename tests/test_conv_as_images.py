"""Convolutions over space or time alone, run as convolutions of images, give what torch's 3D convolution gives."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import fx, nn

from atfr.models.packed.cpu import SpatialConv3d, TemporalConv3d, run_as_images

CONVOLUTIONS = {
    "1x1x1": (SpatialConv3d, dict(kernel_size=1)),
    "1x1x1 strided": (SpatialConv3d, dict(kernel_size=1, stride=(1, 2, 2), bias=False)),
    "1x3x3": (SpatialConv3d, dict(kernel_size=(1, 3, 3), padding=(0, 1, 1))),
    "1x3x3 depthwise": (SpatialConv3d, dict(kernel_size=(1, 3, 3), padding=(0, 2, 2), dilation=(1, 2, 2), groups=4, bias=False)),
    "3x1x1": (TemporalConv3d, dict(kernel_size=(3, 1, 1), padding=(1, 0, 0))),
    "5x1x1 strided": (TemporalConv3d, dict(kernel_size=(5, 1, 1), stride=(2, 1, 1), padding=(3, 0, 0), bias=False)),
    "3x1x1 depthwise": (TemporalConv3d, dict(kernel_size=(3, 1, 1), padding=(2, 0, 0), dilation=(2, 1, 1), groups=4)),
    "1x1x1 strided in time": (TemporalConv3d, dict(kernel_size=1, stride=(3, 1, 1))),
}


@pytest.mark.parametrize(("name", "clips", "channels_last"), itertools.product(CONVOLUTIONS, (1, 3), (True, False)))
def test_outputs_and_gradients_are_those_of_torch(name, clips, channels_last):
    torch.manual_seed(0)
    kind, options = CONVOLUTIONS[name]
    plain = nn.Conv3d(4, 8, **options)
    x = torch.randn(clips, 4, 5, 7, 6)
    ours, given = copy.deepcopy(plain), x.clone()
    if channels_last:
        ours, given = ours.to(memory_format=torch.channels_last_3d), given.contiguous(memory_format=torch.channels_last_3d)
    run_as_images(ours)
    assert type(ours) is kind and list(ours.state_dict()) == list(plain.state_dict())
    results = []
    for conv, clip in ((plain, x), (ours, given)):
        out = conv(clip.requires_grad_())
        (out * torch.linspace(0, 1, out.numel()).view_as(out)).sum().backward()
        results.append((out, clip.grad, *(p.grad for p in conv.parameters())))
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    if channels_last:
        assert results[1][0].is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_small_1x1x1_convolution_of_one_clip_runs_in_one_dnn(channels_last):
    """The other way is what this is there to avoid; without channels-last memory it is still taken."""
    conv = nn.Conv3d(24, 108, 1).to(memory_format=torch.channels_last_3d)
    run_as_images(conv)
    x = torch.randn(1, 24, 20, 20, 20)
    x = x.contiguous(memory_format=torch.channels_last_3d) if channels_last else x
    with torch.inference_mode(), torch.profiler.profile() as profile:
        conv(x)
    slow = any("slow_conv" in event.key for event in profile.key_averages())
    assert slow != channels_last


def test_what_is_over_both_or_may_do_more_than_its_name_says_stays_as_it_is():
    class Own(nn.Conv3d):
        pass

    others = nn.Sequential(
        nn.Conv3d(2, 2, 3), nn.Conv3d(2, 2, 1, stride=2), nn.Conv3d(2, 2, 1, padding=1), nn.Conv3d(2, 2, (1, 3, 3), padding="same"),
        nn.Conv3d(2, 2, (1, 3, 3), padding=(0, 1, 1), padding_mode="reflect"), Own(2, 2, 1),
    )  # fmt: skip
    before = [type(module) for module in others]
    run_as_images(others)
    assert [type(module) for module in others] == before


def test_torch_fx_finds_the_3d_convolutions_in_them():
    network = nn.Sequential(nn.Conv3d(2, 3, 1), nn.Conv3d(3, 2, (3, 1, 1))).to(memory_format=torch.channels_last_3d)
    run_as_images(network)
    x = torch.randn(2, 2, 4, 5, 5).contiguous(memory_format=torch.channels_last_3d)
    traced = fx.symbolic_trace(network)
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [torch.conv3d, torch.conv3d]
    torch.testing.assert_close(traced(x), network(x))
