"""Pictures of merged frames and of timelines: what is in them, not how it looks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL.Image import Image

from atfr.models.backbones.x3d import x3d
from atfr.models.sgs.config import SGSConfig
from atfr.viz.merges import COLORS, Merge, merge_picture, merges_of
from atfr.viz.timeline import Window, stretches, timeline_picture


def has_color(picture: Image, color: str) -> bool:
    pixels, wanted = np.asarray(picture).astype(int), np.round(255 * np.array(to_rgb(color)))
    return bool((np.abs(pixels - wanted).max(axis=2) <= 2).sum() > 50)


def test_what_is_drawn_of_a_batch_is_what_each_layer_did_with_each_clip():
    model = x3d(size="tiny", num_classes=3, sgs=SGSConfig.from_preset("atfr", after=("stem", "res3"), width=0.4)).eval()
    with torch.inference_mode():
        _, sampling = model(torch.randn(2, 3, 8, 32, 32).cumsum(dim=2), return_sampling=True)
    for clip in range(2):
        merges = merges_of(sampling, clip)
        assert [merge.kept for merge in merges] == list(sampling.bins[clip])
        for merge, layer in zip(merges, sampling.layers):
            z = layer.proposal.z[clip]
            costs = [((z[t] - z[t - 1]) ** 2).mean().item() / 2 for t in range(1, layer.given[clip])]
            assert merge.costs.tolist() == pytest.approx(costs)
    assert merges_of(sampling, 1)[1].assignment.shape == (sampling.bins[1][0],)  # the second layer sees what the first kept


def test_the_cost_of_merging_two_frames_is_what_it_adds_to_the_variance_within_bins():
    one, two = np.random.default_rng(0).random((2, 5))
    mean = (one + two) / 2
    added = ((one - mean) ** 2).mean() + ((two - mean) ** 2).mean()
    assert added == pytest.approx(((one - two) ** 2).mean() / 2)


def test_runs_are_the_neighbouring_features_of_one_bin():
    assert Merge("", np.array([0, 0, 1, 0, 2, 2]), None).runs == [(0, 0, 2), (1, 2, 3), (0, 3, 4), (2, 4, 6)]
    assert Merge("", np.array([-1, 0, -1, -1, 1]), None).runs == [(0, 1, 2), (1, 4, 5)]


@pytest.mark.parametrize("count", [8, 16, 64])
def test_a_picture_shows_a_bar_of_each_bins_color(count):
    frames = np.full((count, 20, 30, 3), 255, np.uint8)
    kept = 5
    merge = Merge("res2", np.arange(count) * kept // count, np.linspace(0, 1, count - 1))
    picture = merge_picture(frames, [merge], gflops=1.0, dense_gflops=2.0)
    assert [has_color(picture, color) for color in COLORS[1:]] == [number < kept for number in range(1, len(COLORS))]  # the first is of the cost, too


def test_layers_are_drawn_below_each_other_and_dense_clips_alone():
    frames = np.zeros((8, 20, 20, 3), np.uint8)
    one = Merge("slow", np.array([0, 0, 1, 1]), np.ones(3))
    other = Merge("fast", np.array([0, 1, 0, 2, 1, 0, 2, 1]), None)  # as a layer that sorts by similarity
    dense, single, both = (merge_picture(frames, merges, gflops=1.0, dense_gflops=1.0) for merges in ([], [one], [one, other]))
    assert dense.height < single.height < both.height and dense.width == single.width == both.width


def windows(*labels: str) -> list[Window]:
    return [Window(2.0 * number, 2.0 * number + 4, label, 0.9, 0.5) for number, label in enumerate(labels)]


def test_neighbouring_windows_of_one_label_are_one_stretch():
    assert stretches(windows("a", "a", "b", "a")) == [(0, 1, "a"), (2, 2, "b"), (3, 3, "a")]


@pytest.mark.parametrize("labels", [("a",), ("a", "b") * 20], ids=["one window", "forty windows"])
def test_a_timeline_shows_each_labels_color(labels):
    picture = timeline_picture(np.zeros((len(labels), 24, 32, 3), np.uint8), windows(*labels))
    assert all(has_color(picture, COLORS[number]) for number in range(len(set(labels)))) and not has_color(picture, COLORS[2])
