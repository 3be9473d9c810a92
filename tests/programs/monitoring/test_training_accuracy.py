"""The accuracy and the learning rates that are logged of training batches."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from training import SETTINGS, batch, network, train

from atfr.data.mixup import mixing
from atfr.engine.optim import groups
from atfr.models.video_net import VideoNet


@pytest.mark.parametrize("parts", [1, 3])
def test_training_accuracy_is_that_of_the_networks_own_logits(tmp_path, parts):
    wide = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(3, 9))
    model = VideoNet(wide, stages={}, sgs=None)
    clips = batch(0)
    with torch.no_grad():
        rows = model(clips.clips).tolist()
    ranks = [sorted(range(9), key=lambda name: -row[name]).index(label) for row, label in zip(rows, clips.labels.tolist())]
    train(tmp_path, [clips], replace(SETTINGS, accumulate=parts), model)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert (line["top1"], line["top5"]) == (100 * sum(rank < 1 for rank in ranks) / 8, 100 * sum(rank < 5 for rank in ranks) / 8)


def test_mixed_clips_have_no_training_accuracy_and_another_rate_of_the_head_is_logged(tmp_path):
    model = network()
    optimizer = torch.optim.SGD(groups(model, lr=0.1, weight_decay=0.0, head_lr=10.0))
    train(tmp_path, [batch(0), batch(1)], model=model, optimizer=optimizer, mix=mixing(mixup=0.8, cutmix=None, num_classes=3, seed=0))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["lr"], line["lr_group_2"]) for line in lines if line["split"] == "train"] == [(0.1, 1.0)] * 2
    assert not any("top1" in line or "lr_group_1" in line for line in lines if line["split"] == "train")
