"""What the layers behind SGS are told about time, against loops over the kept features."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from outcomes import run
from torch import Tensor, nn

import atfr
from atfr.models.packed.segments import Segments
from atfr.models.sgs.config import PRESETS
from atfr.models.sgs.time_embedding import TimeEmbedding, time_features


def expected_features(times: list[float], frames: int) -> list[list[float]]:
    rows = []
    for i, t in enumerate(times):
        before = t - times[i - 1] if i else 2 * (t + 0.5)
        behind = times[i + 1] - t if i + 1 < len(times) else 2 * (frames - 0.5 - t)
        rows.append([2 * (t + 0.5) / frames - 1, math.log(before), math.log(behind)])
    return rows


def randomised(embedding: TimeEmbedding) -> TimeEmbedding:
    for parameter in embedding.parameters():
        nn.init.normal_(parameter, std=0.5)
    return embedding


def small_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(3, 6, (1, 3, 3), padding=(0, 1, 1)), nn.ReLU(), nn.Conv3d(6, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 5)
    )


@pytest.mark.parametrize("gap", [0, 1])
def test_each_feature_is_scaled_and_shifted_by_its_time_and_the_distances_to_its_neighbours(gap):
    clips, frames = [[0.0, 1.5, 6.0], [3.5], [2.0, 7.0]], 8
    segments = Segments((3, 1, 2), frames, torch.tensor([t for clip in clips for t in clip]), gap)
    embedding = randomised(TimeEmbedding(4))
    x = torch.randn(1, 4, segments.num_slots, 2, 2)
    found = embedding.packed(x, segments)
    places = range(6) if segments.layout is None else segments.layout.kept.tolist()
    rows = [row for clip in clips for row in expected_features(clip, frames)]
    for place, row in zip(places, rows):
        change = embedding.linear.weight @ torch.tensor(row) + embedding.linear.bias  # [2 C]
        for channel in range(4):
            torch.testing.assert_close(found[0, channel, place], x[0, channel, place] * (1 + change[channel]) + change[4 + channel])


def test_a_clip_that_keeps_everything_has_distances_of_one():
    times = torch.arange(6.0)
    first, last = times == 0, times == 5
    found = time_features(times, first, last, 6)
    assert found[:, 1:].eq(0).all()
    torch.testing.assert_close(found[:, 0], torch.tensor(expected_features(times.tolist(), 6))[:, 0])


@pytest.mark.parametrize("after", ["0", "input"])
def test_at_the_start_nothing_changes_and_then_clips_are_still_independent_of_their_neighbours(after):
    network, clips = small_network(), torch.cat([torch.randn(1, 3, n, 8, 8).repeat_interleave(12 // n, dim=2) for n in (2, 3, 6, 12)])
    options = replace(PRESETS["atfr"], after=after, width=0.5)
    plain = atfr.add_sgs(network, sgs=options).eval()
    told = atfr.add_sgs(network, sgs=replace(options, time_embedding=True)).eval()
    torch.testing.assert_close(run(told, clips).logits, run(plain, clips).logits)
    (layer,) = told.sgs.values()
    randomised(layer.time)
    together = run(told, clips)
    assert len(set(together.bins)) > 1
    assert not torch.allclose(together.logits, run(plain, clips).logits, atol=1e-3)
    for clip in range(4):
        torch.testing.assert_close(run(told, clips[clip : clip + 1]).logits[0], together.logits[clip], atol=1e-4, rtol=1e-4)


def test_it_is_learned_and_is_in_the_state_dict():
    model = atfr.add_sgs(small_network(), sgs=replace(PRESETS["uniform"], after="0", num_bins=4, time_embedding=True))
    model.train()(torch.randn(2, 3, 8, 8, 8)).square().sum().backward()
    (layer,) = model.sgs.values()
    gradient: Tensor = layer.time.linear.weight.grad
    assert gradient.abs().sum() > 0
    assert any(name.endswith("time.linear.weight") for name in model.state_dict())
