"""Precise batch norm, calibrated widths and schedules against direct computations."""

from __future__ import annotations

import math

import pytest
import torch
from outcomes import run
from torch import nn

from atfr.engine.calibration import calibrate_layers, precise_batch_norm, refresh_statistics, steer_widths
from atfr.engine.optim import cosine, sgd
from atfr.models.backbones.x3d import x3d
from atfr.models.sgs.config import SGSConfig

ATFR = SGSConfig.from_preset("atfr", keep_ratio=0.5)


def test_precise_batch_norm_is_the_mean_and_variance_over_all_values_of_all_batches():
    model = nn.Sequential(nn.BatchNorm3d(3), nn.ReLU()).eval()
    batches = [torch.randn(n, 3, 4, 5, 5) * (i + 1) + i for i, n in enumerate((2, 5, 1))]
    precise_batch_norm(model, batches, forward=model)
    values = torch.cat(batches).transpose(0, 1).flatten(1)
    torch.testing.assert_close(model[0].running_mean, values.mean(dim=1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model[0].running_var, values.var(dim=1, correction=0), atol=1e-5, rtol=1e-5)
    assert not model.training and model[0].momentum == 0.1


def test_precise_batch_norm_sees_the_features_that_sgs_kept():
    model = x3d(size="tiny", num_classes=3, sgs=SGSConfig.from_preset("atfr", width=0.3))
    norm = model.dense_network.blocks[3].res_blocks[0].branch2.norm_a
    seen = []
    clips = [torch.randn(n, 3, 16, 32, 32) for n in (3, 2)]
    clips[0][0] = clips[0][0, :, :1]  # static: fewer bins than the others
    handle = norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    precise_batch_norm(model, clips, forward=model)
    handle.remove()
    values = torch.cat([x.transpose(0, 1).flatten(1) for x in seen], dim=1)
    torch.testing.assert_close(norm.running_mean, values.mean(dim=1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(norm.running_var, values.var(dim=1, correction=0), atol=1e-5, rtol=1e-4)


def test_a_calibrated_network_keeps_its_keep_ratio_on_the_calibration_clips():
    model = x3d(size="tiny", num_classes=3, sgs=ATFR).eval()
    batches = [torch.randn(8, 3, 16, 32, 32).cumsum(dim=2) / 4 for _ in range(4)]
    calibrate_layers(model, lambda: batches)
    with torch.no_grad():
        kept = [b for clips in batches for (b,) in run(model, clips).bins]
    assert sum(kept) / len(kept) == pytest.approx(8.0, abs=0.3)


def test_an_untrained_network_is_calibrated_on_the_features_that_training_will_see():
    model = x3d(size="tiny", num_classes=3, sgs=ATFR)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm3d):
            norm.running_mean.fill_(3.0)  # far from the batch's: evaluation would see other features
    batches = [torch.randn(8, 3, 16, 32, 32).cumsum(dim=2) / 4 for _ in range(4)]
    calibrate_layers(model, lambda: batches, untrained=True)
    assert (model.dense_network.blocks[0].norm.running_mean == 3.0).all()
    model.train()
    kept = [b for clips in batches for (b,) in run(model, clips).bins]
    assert sum(kept) / len(kept) == pytest.approx(8.0, abs=0.3)


def test_refreshed_statistics_are_those_of_the_features_kept_at_the_refreshed_width():
    model = x3d(size="tiny", num_classes=3, sgs=ATFR)
    batches = [torch.randn(8, 3, 16, 32, 32).cumsum(dim=2) / 4 for _ in range(2)]
    calibrate_layers(model, lambda: batches, untrained=True)
    model.sgs["stem"].width.mul_(3)  # as if it had drifted
    refresh_statistics(model, lambda: batches)
    norm = model.dense_network.blocks[2].res_blocks[0].branch2.norm_a
    mean = norm.running_mean.clone()
    precise_batch_norm(model, batches, forward=model)
    torch.testing.assert_close(norm.running_mean, mean)
    with torch.no_grad():
        kept = [b for clips in batches for (b,) in run(model.eval(), clips).bins]
    assert sum(kept) / len(kept) == pytest.approx(8.0, abs=0.3)


def test_a_fixed_width_and_a_network_without_a_width_are_left_alone():
    fixed = x3d(size="tiny", num_classes=3, sgs=SGSConfig.from_preset("atfr", width=0.5))
    for model in (fixed, x3d(size="tiny", num_classes=3, sgs=SGSConfig.from_preset("reference")), x3d(size="tiny", num_classes=3)):
        calibrate_layers(model, lambda: [torch.randn(2, 3, 16, 32, 32)])
        steer_widths(model, [run(model, torch.randn(2, 3, 16, 32, 32)).layers])
    assert fixed.sgs["stem"].width == 0.5


def test_weight_decay_spares_biases_and_norms():
    model = nn.Sequential(nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4), nn.Linear(4, 2))
    decayed, spared = sgd(model, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True).param_groups
    assert [p.shape for p in decayed["params"]] == [model[0].weight.shape, model[2].weight.shape]
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0.0) and len(spared["params"]) == 4


def test_the_cosine_schedule_passes_through_its_known_points():
    def factor(step):
        return cosine(warmup=0.1, start_factor=0.2, end_factor=0.01)(step, 100)

    assert factor(0) == pytest.approx(0.2)
    assert factor(5) == pytest.approx(0.6)
    assert factor(10) == pytest.approx(1.0)
    assert factor(55) == pytest.approx(0.505)
    assert factor(100) == pytest.approx(0.01)
    assert factor(40) == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi / 3)) / 2)
