"""GFLOPs by B' against direct analyses, a second counter and published figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from outcomes import run
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from toy_network import Smoothed, Toy

from atfr.models.backbones.r2plus1d import r2plus1d
from atfr.models.backbones.slowfast import slowfast
from atfr.models.backbones.x3d import x3d
from atfr.models.flops import GflopsTable
from atfr.models.sgs.config import SGSConfig
from atfr.models.video_net import VideoNet

ATFR = SGSConfig.from_preset("atfr", width=0.3)
REFERENCE = SGSConfig.from_preset("reference")
SHAPE = (3, 16, 48, 48)


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, clips):
        return self.model(clips)


def test_x3d_m_costs_the_published_gflops():
    # fvcore without batch norm. The paper's own table says 4.7 for X3D-M at 16 x 224 x 224.
    table = GflopsTable(x3d(size="M", num_classes=400), (3, 16, 224, 224))
    assert table.dense == pytest.approx(4.73, abs=0.005)
    assert table.at((3,)) == table.dense


def test_the_number_of_parameters_is_pytorchvideos():
    assert sum(p.numel() for p in x3d(size="M", num_classes=400).parameters()) == 3_794_274


@pytest.mark.filterwarnings("ignore:.*:torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(REFERENCE, id="reference", marks=pytest.mark.slow),
        pytest.param(ATFR, id="atfr"),
        pytest.param(replace(ATFR, embed_from="features"), id="embeds features", marks=pytest.mark.slow),
    ],
)
def test_the_table_equals_a_direct_analysis_of_a_clip(options):
    model = x3d(size="tiny", num_classes=6, sgs=options).eval()
    table = GflopsTable(model, SHAPE)
    for changes in (1, 4, 16):
        held = torch.arange(16) * changes // 16
        clip = torch.randn(1, *SHAPE)[:, :, held]
        with torch.no_grad():
            (bins,) = run(model, clip).bins
        analysis = FlopCountAnalysis(Logits(model), clip).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        direct = sum(flops for kind, flops in analysis.by_operator().items() if kind != "batch_norm")
        assert table.at(bins) * 1e9 == pytest.approx(direct, rel=1e-9)


def test_torchs_own_counter_agrees_on_what_both_count():
    model = x3d(size="tiny", num_classes=6).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, *SHAPE))
    assert GflopsTable(model, SHAPE).dense == pytest.approx(counter.get_total_flops() / 2 / 1e9, rel=1e-6)


@pytest.mark.slow
def test_a_clip_costs_more_the_more_features_it_keeps_and_the_dense_network_when_it_keeps_all():
    table = GflopsTable(x3d(size="tiny", num_classes=6, sgs=replace(ATFR, after="res2")), SHAPE)
    costs = [table.at((bins,)) for bins in range(1, 17)]
    assert costs == sorted(costs) and costs[0] < 0.5 * table.dense
    overhead = costs[-1] / table.dense - 1
    assert 0 <= overhead < 0.025  # the sampling layer itself


def with_a_module_of_its_own(sgs: SGSConfig) -> VideoNet:
    network = Toy(nn.Sequential(Smoothed(), nn.Conv3d(8, 8, 3, padding=1)))
    return VideoNet(network, stages={"first": "first"}, sgs=replace(sgs, after="first"), probe=(8, 8, 8))


def tiny(build: Callable[..., VideoNet]) -> Callable[[SGSConfig], VideoNet]:
    return lambda sgs: build(size="tiny", num_classes=6, sgs=sgs)


def slowfast_fused(rule: str) -> Callable[[SGSConfig], VideoNet]:
    return lambda sgs: slowfast(size="4x16-R50", num_classes=6, sgs=sgs, fusion=rule)


PAIRS = [(1, 1), (1, 32), (4, 1), (4, 32), (2, 9), (3, 17), (4, 5)]


@pytest.mark.parametrize(
    "build, sgs, shape, bins, tolerance, most",
    [
        pytest.param(with_a_module_of_its_own, ATFR, (3, 8, 8, 8), range(1, 9), 1e-6, 3, id="a module of its own"),
        pytest.param(tiny(x3d), ATFR, SHAPE, range(1, 17), 1e-6, 4, id="constant", marks=pytest.mark.slow),
        pytest.param(tiny(r2plus1d), ATFR, SHAPE, range(1, 17), 1e-6, 8, id="staircase", marks=pytest.mark.slow),
        pytest.param(tiny(r2plus1d), replace(ATFR, execution="bucketed"), SHAPE, range(1, 17), 0.1, 8, id="bucketed", marks=pytest.mark.slow),
        pytest.param(tiny(r2plus1d), replace(ATFR, after=("input", "res4")), (3, 9, 32, 32), [(k, max(1, k // 4)) for k in (1, 3, 5, 7, 9)], 1e-2, 8, id="two layers", marks=pytest.mark.slow),
        pytest.param(slowfast_fused("aligned"), replace(ATFR, after="res2"), (3, 32, 32, 32), PAIRS, 1e-6, 4, id="two pathways", marks=pytest.mark.slow),
        pytest.param(slowfast_fused("released"), replace(ATFR, after="res2"), (3, 32, 32, 32), PAIRS, 1e-6, 10, id="lengths that a module changes", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_an_estimate_from_a_few_analyses_is_the_table(build, sgs, shape, bins, tolerance, most):
    """The r2plus1d strides over time, so that its cost is a staircase in B'."""
    model = build(sgs)
    table, estimated = GflopsTable(model, shape), GflopsTable(model, shape)
    bins = [kept if isinstance(kept, tuple) else (kept,) for kept in bins]
    estimated.at(bins[0])  # what was asked before does not matter
    assert estimated.estimate(bins).tolist() == pytest.approx([table.at(kept) for kept in bins], rel=tolerance)
    assert len(estimated._by_bins) <= most


@pytest.mark.slow
def test_a_clips_gflops_are_those_of_the_table_at_its_bins():
    model, clips = x3d(size="tiny", num_classes=6, sgs=ATFR).eval(), torch.randn(3, *SHAPE)
    clips[1] = clips[1, :, :1]
    _, sampling = model(clips, return_sampling=True)
    table = GflopsTable(model, SHAPE)
    assert len(set(sampling.bins)) > 1
    assert sampling.gflops.tolist() == pytest.approx([table.at(bins) for bins in sampling.bins])
    _, dense = x3d(size="tiny", num_classes=6).eval()(clips, return_sampling=True)
    assert dense.gflops.tolist() == pytest.approx([table.dense] * 3)


@pytest.mark.parametrize("after, depths", [("stem", (0,)), (("stem", "res2", "res4"), (0, 1, 2)), (("res4", "stem"), (1, 0))])
def test_the_depth_of_a_layer_is_how_many_lie_in_front_of_it(after, depths):
    table = GflopsTable(x3d(size="tiny", num_classes=6, sgs=replace(ATFR, after=after)), SHAPE)
    assert table.depths == depths and table.frames == table.most == (16,) * len(depths) and table.least == (1,) * len(depths)


@pytest.mark.slow
def test_layers_side_by_side_have_no_depth_and_frames_of_their_own():
    table = GflopsTable(slowfast(size="8x8-R50", num_classes=6, sgs=replace(ATFR, after="res2", num_bins=6)), (3, 16, 32, 32))
    assert table.depths == (0, 0) and table.frames == (4, 16) and table.most == (4, 6)


def test_counting_leaves_the_model_in_the_mode_it_was_in():
    model = x3d(size="tiny", num_classes=6, sgs=ATFR).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    GflopsTable(model, SHAPE).at((4,))
    assert model.training
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name])
