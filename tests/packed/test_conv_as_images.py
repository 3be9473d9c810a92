"""3D convolutions over space or time alone, run as 2D ones, compute what torch's 3D convolution computes."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from atfr.models.graph.tracing import DenseNetwork
from atfr.models.packed.cpu import conv3d, separable
from atfr.models.video_net import VideoNet

CONVOLUTIONS = {
    "1x1x1": ("space", dict(kernel_size=1)),
    "1x1x1 strided": ("space", dict(kernel_size=1, stride=(1, 2, 2), bias=False)),
    "1x3x3": ("space", dict(kernel_size=(1, 3, 3), padding=(0, 1, 1))),
    "1x3x3 depthwise": ("space", dict(kernel_size=(1, 3, 3), padding=(0, 2, 2), dilation=(1, 2, 2), groups=4, bias=False)),
    "3x1x1": ("time", dict(kernel_size=(3, 1, 1), padding=(1, 0, 0))),
    "5x1x1 strided": ("time", dict(kernel_size=(5, 1, 1), stride=(2, 1, 1), padding=(3, 0, 0), bias=False)),
    "3x1x1 depthwise": ("time", dict(kernel_size=(3, 1, 1), padding=(2, 0, 0), dilation=(2, 1, 1), groups=4)),
    "1x1x1 strided in time": ("time", dict(kernel_size=1, stride=(3, 1, 1))),
    "1x1x1 padded in time": ("time", dict(kernel_size=1, padding=(1, 0, 0))),
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
    assert separable(ours) == kind
    results = []
    for module, run, clip in ((plain, plain, x), (ours, lambda clip: conv3d(ours, clip), given)):
        out = run(clip.requires_grad_())
        (out * torch.linspace(0, 1, out.numel()).view_as(out)).sum().backward()
        results.append((out, clip.grad, *(p.grad for p in module.parameters())))
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    if channels_last:
        assert results[1][0].is_contiguous(memory_format=torch.channels_last_3d)


def is_slow(run, x: Tensor) -> bool:
    """Whether this runs torch's own 3D convolution, which is slow, in place of oneDNN's."""
    with torch.inference_mode(), torch.profiler.profile() as profile:
        run(x)
    return any("slow_conv" in event.key for event in profile.key_averages())


def small_clip() -> Tensor:
    return torch.randn(1, 24, 20, 20, 20).contiguous(memory_format=torch.channels_last_3d)


def test_a_small_1x1x1_convolution_of_one_clip_runs_in_one_dnn():
    """The other way is what this is there to avoid; without channels-last memory it is still taken."""
    conv = nn.Conv3d(24, 108, 1).to(memory_format=torch.channels_last_3d)
    assert not is_slow(lambda x: conv3d(conv, x), small_clip())
    assert is_slow(lambda x: conv3d(conv, x), small_clip().contiguous())


def test_convolutions_over_both_and_subclasses_are_left_alone():
    class Own(nn.Conv3d):
        pass

    others = (
        nn.Conv3d(2, 2, 3), nn.Conv3d(2, 2, 1, stride=2), nn.Conv3d(2, 2, 1, padding=1), nn.Conv3d(2, 2, (1, 3, 3), padding="same"),
        nn.Conv3d(2, 2, (1, 3, 3), padding=(0, 1, 1), padding_mode="reflect"), Own(2, 2, 1), nn.Conv2d(2, 2, 1),
    )  # fmt: skip
    assert {separable(module) for module in others} == {None}


def test_hooks_of_a_convolution_run():
    conv, seen = nn.Conv3d(2, 2, 1).to(memory_format=torch.channels_last_3d), []
    x = torch.randn(1, 2, 2, 3, 3).contiguous(memory_format=torch.channels_last_3d)
    conv.register_forward_pre_hook(lambda *_: seen.append("before"))
    conv.register_forward_hook(lambda *_: seen.append("after"))
    conv3d(conv, x)
    assert seen == ["before", "after"]


class Net(nn.Module):
    """A network with a part that has children of its own; with `dropout` its forward reads the training mode."""

    def __init__(self, dropout: bool = False) -> None:
        super().__init__()
        self.conv, self.block, self.dropout = nn.Conv3d(3, 24, 1), nn.Sequential(nn.Conv3d(24, 108, 1), nn.ReLU()), dropout

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.conv(x)).mean((2, 3, 4))
        return nn.functional.dropout(x, 0.5, self.training) if self.dropout else x


def dense(**options) -> VideoNet:
    return VideoNet(Net(**options), stages={}, sgs=None).eval()


def clips() -> Tensor:
    return torch.randn(1, 3, 20, 20, 20)


def test_a_dense_networks_modules_stay_what_they_are_and_run_in_one_dnn():
    model = dense()
    assert [type(module) for module in model.dense_network.modules()] == [Net, nn.Conv3d, nn.Sequential, nn.Conv3d, nn.ReLU]
    assert list(model.dense_network.state_dict()) == list(Net().state_dict())
    for each in (model, copy.deepcopy(model)):
        assert not is_slow(each, clips()) and is_slow(each.dense_network, clips())
        torch.testing.assert_close(each(x := clips()), each.dense_network(x))


def test_a_copy_trains_its_own_parameters():
    model = dense()
    twin = copy.deepcopy(model)
    twin(clips()).sum().backward()
    assert all(p.grad is None for p in model.parameters()) and all(p.grad is not None for p in twin.parameters())


def test_hooks_of_a_part_of_a_dense_network_run_and_modules_put_in_its_place_later_are_used():
    model, seen = dense(), []
    handle = model.dense_network.block.register_forward_hook(lambda *_: seen.append(1))
    model(clips())
    handle.remove()
    model(clips())
    assert seen == [1]
    model.dense_network.block[0] = nn.Conv3d(24, 5, 1)
    assert model(clips()).shape == (1, 5)


def test_a_network_that_reads_its_mode_drops_in_training_alone():
    model, x = dense(dropout=True), clips()
    torch.testing.assert_close(model(x), model.dense_network(x))
    assert (model.train()(x) == 0).any()


def test_a_network_that_cannot_be_traced_runs_as_it_is():
    class Untraceable(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    network = Untraceable()
    assert DenseNetwork(network)(x := clips()).equal(network(x))
