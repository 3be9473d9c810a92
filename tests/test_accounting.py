"""GFLOPs by B' against direct analyses, a second counter and published figures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from outcomes import run
from torch.utils.flop_counter import FlopCounterMode

from atfr.models.backbones.x3d import x3d
from atfr.models.flops import GflopsTable, _Trunk, gflops
from atfr.models.sgs.config import SGSConfig

ATFR = SGSConfig.from_preset("reference", similarity="anchor", kernel="mean", scale="absolute", order="time", embedding="pooled", before_activation=False, width=0.3)
SHAPE = (3, 16, 48, 48)


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, clips):
        return self.model(clips)


def test_x3d_m_costs_the_published_gflops():
    # DESIGN: fvcore without batch norm. The paper's own table says 4.7 for X3D-M at 16 x 224 x 224.
    table = GflopsTable(x3d(size="M", num_classes=400), (3, 16, 224, 224))
    assert table.dense == pytest.approx(4.73, abs=0.005)
    assert table.at((3,)) == table.dense


def test_the_number_of_parameters_is_pytorchvideos():
    assert sum(p.numel() for p in x3d(size="M", num_classes=400).parameters()) == 3_794_274


@pytest.mark.filterwarnings("ignore:.*:torch.jit.TracerWarning")
@pytest.mark.parametrize("options", [SGSConfig.from_preset("reference"), ATFR, replace(ATFR, embed_from="clip")], ids=["reference", "atfr", "looks at the clip"])
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


def test_a_clip_costs_more_the_more_features_it_keeps_and_the_dense_network_when_it_keeps_all():
    table = GflopsTable(x3d(size="tiny", num_classes=6, sgs=ATFR), SHAPE)
    costs = [table.at((bins,)) for bins in range(1, 17)]
    assert costs == sorted(costs) and costs[0] < 0.5 * table.dense
    overhead = costs[-1] / table.dense - 1
    assert 0 <= overhead < 0.025  # the sampling layer itself


@pytest.mark.filterwarnings("ignore:.*:torch.jit.TracerWarning")
@pytest.mark.parametrize("after,batch", [("stem", [(5,), (2,), (9,)]), (["res2", "res4"], [(5, 3), (9, 1), (1, 1), (12, 9)])])
def test_executed_gflops_of_a_packed_batch_are_those_of_a_direct_analysis_of_it(after, batch):
    model = x3d(size="tiny", num_classes=6, sgs=replace(ATFR, after=after)).eval()
    table = GflopsTable(model, SHAPE)
    assert table.executed(batch[:1]) == pytest.approx(table.at(batch[0]))
    with torch.no_grad():
        features = model.run_stem(torch.randn(1, *SHAPE))[0].expand(len(batch), -1, -1, -1, -1)
        direct = gflops(_Trunk(model, batch), features)
    assert table.executed(batch) > sum(table.at(bins) for bins in batch)
    assert table.executed(batch) - len(batch) * table._stem == pytest.approx(direct, rel=1e-6)


def test_counting_leaves_the_model_in_the_mode_it_was_in():
    model = x3d(size="tiny", num_classes=6, sgs=ATFR).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    GflopsTable(model, SHAPE).at((4,))
    assert model.training
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name])
