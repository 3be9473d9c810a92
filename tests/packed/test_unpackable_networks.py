"""Networks that packing does not know, or knows wrongly: they run bucketed or are refused."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from backbone_cases import CASES, stages_of
from outcomes import Outcome, run
from placed_backbones import ATFR, NETS, REFERENCE, backbone, clips_for, close
from plain_execution import on_what_is_kept
from torch import Tensor, nn
from toy_network import Smoothed, Toy
from uneven_clips import uneven_clips

from atfr.models.packed.segments import Segments
from atfr.models.sgs.config import SGSConfig
from atfr.models.video_net import VideoNet


class Shuffle(nn.Module):
    """Something of one's own: the mean of the frames before this one."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(2)


class Leaky(Smoothed):
    """Claims a packed form, in which clips see each other."""

    def packed_forward(self, pair: tuple[Tensor, Segments]) -> tuple[Tensor, Segments]:
        return self.conv(pair[0]), pair[1]


class Overall(Leaky):
    """Another leak: a mean over the whole batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(dim=(2, 3, 4), keepdim=True)

    def packed_forward(self, pair: tuple[Tensor, Segments]) -> tuple[Tensor, Segments]:
        return pair[0] + pair[0].mean(dim=(2, 3, 4), keepdim=True), pair[1]


def toy(second: nn.Module, norm: bool = False, **options: object) -> VideoNet:
    network = Toy(nn.Sequential(second, nn.Conv3d(8, 8, 3, padding=1), *([nn.BatchNorm3d(8)] if norm else [])))
    sgs = SGSConfig.from_preset("atfr", **{"after": "first", "width": 0.5, **options})
    return VideoNet(network, stages={"first": "first", "second": "second.0"}, sgs=sgs, probe=(8, 8, 8)).eval()


def check_forced(net: VideoNet, bins: tuple[int, ...] = (3, 8, 1, 3, 5), tolerance: float = 1e-5) -> Outcome:
    clips = torch.randn(len(bins), 3, 8, 8, 8)
    with torch.no_grad():
        batch = run(net, clips, [bins])
        assert batch.bins == [(b,) for b in bins]
        alone = torch.cat([on_what_is_kept(net, {"first": "first"}, clip, lambda *_: b).logits[None] for clip, b in zip(clips, bins)])
        close(batch.logits / alone.std(), alone / alone.std(), tolerance)
    return batch


def test_a_network_with_an_unknown_module_runs_bucketed_and_says_why(caplog):
    with caplog.at_level(logging.WARNING):
        net = toy(Shuffle())
    assert net.execution == "bucketed"
    assert "cumsum" in caplog.text and "no packed form" in caplog.text and "runs bucketed" in caplog.text
    check_forced(net)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        net = toy(nn.LocalResponseNorm(2))
    assert net.execution == "bucketed" and "second.0 behind SGS has no packed form: LocalResponseNorm" in caplog.text
    check_forced(net)
    with torch.no_grad():  # and where clips choose
        clips = uneven_clips(6, 8, 8)
        net.sgs["first"].width.fill_(0.5)
        batch = run(net, clips)
        assert len(set(batch.bins)) > 1
        close(batch.logits, torch.cat([net(clip[None]) for clip in clips]), 1e-5)


class ByName(nn.Module):
    """Gives a module with a packed form of its own its input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.own = Smoothed()

    def forward(self, x: Tensor) -> Tensor:
        return self.own(x=x)


def test_a_packed_form_of_its_own_that_is_called_by_keyword_is_refused_by_name():
    with pytest.raises(ValueError, match=r"second\.0\.own behind SGS.*by position, not as x"):
        toy(ByName(), execution="packed")


def test_bucketed_execution_refuses_batch_norm_that_is_trained():
    net = toy(nn.ReLU(), norm=True, execution="bucketed")
    assert net.execution == "bucketed"
    check_forced(net)
    net.train()
    with pytest.raises(ValueError, match=r"batch norm 'second\.2' the statistics of one bucket after the other: freeze it"):
        net(torch.randn(2, 3, 8, 8, 8), [(1, 4)])
    for module in net.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.eval()
    net(torch.randn(2, 3, 8, 8, 8), [(1, 4)]).sum().backward()
    assert net.dense_network.first.weight.grad.isfinite().all()


def test_bucketed_execution_trains_batch_norm_in_front_of_sgs():
    network = Toy(nn.Conv3d(8, 8, 3, padding=1))
    network.first = nn.Sequential(network.first, nn.BatchNorm3d(8))
    net = VideoNet(network, stages={"first": "first"}, sgs=SGSConfig.from_preset("atfr", after="first", width=0.5, execution="bucketed"), probe=(8, 8, 8)).train()
    clips = torch.randn(3, 3, 8, 8, 8)
    net(clips, [(1, 8, 4)]).sum().backward()
    with torch.no_grad():
        mean = network.first[0](clips).mean((0, 2, 3, 4))
    torch.testing.assert_close(network.first[1].running_mean, 0.1 * mean)  # of the whole batch, once


@pytest.mark.parametrize("name, location, sgs", [pytest.param("r2plus1d 18", "res2", ATFR, marks=pytest.mark.slow), pytest.param("i3d R50", "stem", ATFR, marks=pytest.mark.slow), ("x3d tiny", "res3", REFERENCE)])
def test_bucketed_and_packed_execution_agree(name, location, sgs):
    nets = []
    for execution in ("packed", "bucketed"):
        torch.manual_seed(1)
        options = replace(sgs, after=location, execution=execution)
        nets.append(VideoNet(backbone(name), stages=stages_of(CASES[name]), sgs=options, probe=NETS[name].probe).eval())
    assert [net.execution for net in nets] == ["packed", "bucketed"]
    frames = NETS[name].frames
    with torch.no_grad():
        clips = clips_for(name, 4)
        forced = [(frames, 2, frames // 2, 2)]
        close(nets[0](clips, forced), nets[1](clips, forced))


def test_packed_execution_that_is_asked_for_is_refused_by_name():
    with pytest.raises(ValueError, match="second.0 behind SGS has no packed form: LocalResponseNorm may mix"):
        toy(nn.LocalResponseNorm(2), execution="packed")
    with pytest.raises(ValueError, match=r"'cumsum' \(cumsum\) behind SGS has no packed form"):
        toy(Shuffle(), execution="packed")


class Standardised(nn.Conv3d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight / weight.norm(), bias)


def test_a_convolution_that_computes_its_weight_in_each_call_is_not_packed():
    """Packed, it would be run with the weight that lies there, alone and in a batch alike."""
    sizes = (8, 8, (3, 1, 1), 1, (1, 0, 0))

    def clamp(module: nn.Module, inputs: tuple[Tensor]) -> None:
        module.weight.data.clamp_(-0.01, 0.01)

    normed = nn.Conv3d(*sizes)
    normed.register_forward_pre_hook(clamp)
    for conv in (Standardised(*sizes), normed):
        net = toy(conv)
        assert net.execution == "bucketed"
        check_forced(net)
        with pytest.raises(ValueError, match="computes its weight in each call"):
            toy(conv, execution="packed")


def test_several_layers_on_a_network_that_cannot_be_packed_are_refused():
    with pytest.raises(ValueError, match="a network that cannot run packed takes one SGS layer, not 2"):
        toy(nn.LocalResponseNorm(2), after=("first", "second"))


def test_a_connection_that_passes_the_sampling_by_is_refused_in_any_execution():
    class Bypass(Toy):
        def forward(self, x: Tensor) -> Tensor:
            early = self.first(x)
            return self.pool(torch.cat((self.second(early), early), 1)).flatten(1)

    for second in (nn.ReLU(), nn.Conv3d(8, 8, 3, padding=1)):
        with pytest.raises(ValueError, match="'cat.*' also needs 'first' from before it, which keeps all frames"):
            VideoNet(Bypass(second), stages={"s": "second"}, sgs=replace(ATFR, after="s"), probe=(8, 8, 8))


@pytest.mark.parametrize("leak", [Leaky, Overall])
def test_a_packed_form_that_mixes_clips_is_found_out(leak, caplog):
    with pytest.raises(ValueError, match="logits change by .* standard deviations when clips run packed"):
        toy(leak(), execution="packed")
    with caplog.at_level(logging.WARNING):
        net = toy(leak())
    assert net.execution == "bucketed" and "standard deviations when clips run packed" in caplog.text
    check_forced(net)


def test_a_packed_form_of_ones_own_is_used():
    net = toy(Smoothed(), execution="packed")
    assert net.execution == "packed"
    check_forced(net)
