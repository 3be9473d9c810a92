"""The table of a network's stages adds up, and each stage's share is what fvcore counts in its modules."""

from __future__ import annotations

import pytest
import torch
from fvcore.nn import FlopCountAnalysis

from atfr.engine.stage_costs import HEAD, OTHER, as_table, expected_bins, stage_costs
from atfr.models.backbones.slowfast import slowfast
from atfr.models.backbones.x3d import x3d
from atfr.models.flops import GflopsTable
from atfr.models.sgs.config import SGSConfig

CLIP = (3, 8, 32, 32)


def test_a_stage_of_a_dense_network_costs_what_fvcore_counts_in_its_module():
    model = x3d(size="tiny", num_classes=5).eval()
    rows = stage_costs(model, GflopsTable(model, CLIP), CLIP, ())
    analysis = FlopCountAnalysis(model.dense_network, torch.zeros(1, *CLIP)).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.set_op_handle("aten::batch_norm", lambda inputs, outputs: 0)
    analysis.set_op_handle("aten::mean", lambda inputs, outputs: 0)
    counted = analysis.by_module()
    for row, (name, path) in zip(rows, model.stage_paths.items()):
        assert row.name == name and row.sampled_gflops is None
        module = model.dense_network.get_submodule(path)
        assert row.params == sum(p.numel() for p in module.parameters())
        assert row.dense_gflops == pytest.approx(counted[path] / 1e9, rel=0.01)  # without the pools of squeeze-excitation
    assert rows[0].output == (1, 16, 8, 16, 16)


@pytest.mark.parametrize("network", ["x3d", pytest.param("slowfast", marks=pytest.mark.slow)])
def test_the_columns_add_up_and_only_what_follows_the_layer_gets_cheaper(network):
    frames = 8 if network == "x3d" else 16
    make, size = (x3d, "tiny") if network == "x3d" else (slowfast, "8x8-R50")
    model = make(size=size, num_classes=5, sgs=SGSConfig.from_preset("atfr", after="res2", width=1.0))
    clip = (3, frames, 32, 32)
    table = GflopsTable(model, clip)
    bins = tuple(f // 2 for f in table.frames)
    rows = stage_costs(model, table, clip, bins)
    assert sum(row.params for row in rows) == sum(p.numel() for p in model.parameters())
    assert sum(row.dense_gflops for row in rows) == pytest.approx(table.dense)
    assert sum(row.sampled_gflops for row in rows) == pytest.approx(table.at(bins))
    assert rows[-2].name == HEAD and rows[-1].name == OTHER
    for row in rows[:-2]:
        stage = row.name.rpartition(".")[2]
        half = stage in ("res3", "res4", "res5")
        assert row.sampled_gflops == pytest.approx(row.dense_gflops / 2 if half else row.dense_gflops, rel=0.2 if half else 1e-6), row.name
    assert "with SGS" in as_table(rows) and as_table(rows).splitlines()[-1].startswith("total")


@pytest.mark.parametrize(
    "preset, options, expected",
    [
        pytest.param("atfr", {"keep_ratio": 0.25}, (2,), marks=pytest.mark.slow),
        ("atfr", {"keep_ratio": 0.5, "after": ["stem", "res3"]}, (4, 2)),  # the second keeps half of that half
        ("uniform", {"num_bins": 5}, (5,)),
        pytest.param("identity", {}, (8,), marks=pytest.mark.slow),
        pytest.param("reference", {"after": "stem"}, (4,), marks=pytest.mark.slow),
    ],
)
def test_the_number_of_features_shown_is_that_of_the_keep_ratio_or_the_fixed_number_of_a_baseline(preset, options, expected):
    model = x3d(size="tiny", num_classes=5, sgs=SGSConfig.from_preset(preset, **options))
    assert expected_bins(model, GflopsTable(model, CLIP)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["atfr", "uniform"])
def test_the_number_of_features_shown_costs_the_budget_in_gflops(preset):
    model = x3d(size="tiny", num_classes=5, sgs=SGSConfig.from_preset(preset, gflops=0.7))
    table = GflopsTable(model, CLIP)
    (bins,) = expected_bins(model, table)
    below, own, above = (table.at((b,)) / table.dense for b in (bins - 1, bins, bins + 1))
    assert below < 0.7 < above and (preset == "atfr" or own <= 0.7)
