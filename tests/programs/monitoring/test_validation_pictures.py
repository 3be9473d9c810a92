"""The pictures of a validation, compared with those of predictions that a plain loop makes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monitored_run import CLASSES, events_of, pictures
from PIL import Image
from run_tools import run_tool, small_job

from atfr.cli.validation import spread
from atfr.data.transforms import Normalizer
from atfr.data.types import Video
from atfr.viz.clips import merge_pictures
from atfr.viz.validation import accuracy_by_bins_picture, class_accuracy_picture, confusion_picture


def same(shown: Image.Image, drawn: Image.Image) -> bool:
    """Whether a picture of the event file is this one, reduced to the colours of a palette."""
    return shown.size == drawn.size and np.array_equal(shown.convert("RGB"), drawn.quantize(256, method=2).convert("RGB"))


def test_the_confusion_matrix_and_the_accuracy_of_each_class_are_those_of_a_plain_loop(run, plain):
    events, counts = events_of(run / "tensorboard"), plain.counts()
    moved = counts.copy()
    moved[0] = moved[0][[1, 0, 2]]
    for tag, draw in (("confusion", confusion_picture), ("accuracy", class_accuracy_picture)):
        shown = pictures(events, f"val_classes/{tag}")
        assert list(shown) == [2, 4]
        assert same(shown[4], draw(counts, CLASSES)) and not same(shown[4], draw(moved, CLASSES))


def test_the_accuracy_by_bins_is_that_of_a_plain_loop(run, plain):
    right, total = np.zeros(9, int), np.zeros(9, int)
    for label, prediction, bins in zip(plain.labels, plain.predictions, plain.bins):
        total[bins] += 1
        right[bins] += label == prediction
    shown = pictures(events_of(run / "tensorboard"), "val_clips/accuracy_by_bins")
    assert list(shown) == [2, 4] and same(shown[4], accuracy_by_bins_picture([right], [total], ["stem"]))


def test_the_merges_of_the_same_clips_of_each_class_are_drawn_in_each_epoch(run, plain):
    events = events_of(run / "tensorboard")
    normalise = Normalizer(plain.classifier.clip.mean, plain.classifier.clip.std)
    # The first clips of the three classes, in the order of the list.
    drawn = merge_pictures(plain.classifier.model, plain.clips[:3], normalise=normalise, class_names=CLASSES, labels=plain.labels[:3])
    for number in range(3):
        shown = pictures(events, f"val_merges/clip_{number + 1}")
        assert list(shown) == [2, 4] and same(shown[4], drawn[number])
    assert sorted(tag for tag in events.Tags()["images"] if "merges" in tag) == [f"val_merges/clip_{number}" for number in (1, 2, 3)]


def test_a_picture_shows_another_assignment_and_leaves_the_mode_and_the_random_numbers_alone(plain):
    model, clips = plain.classifier.model, plain.clips[:1]
    draw = {"normalise": Normalizer(plain.classifier.clip.mean, plain.classifier.clip.std), "class_names": CLASSES}
    (before,) = merge_pictures(model, clips, **draw)
    layer, width = model.sgs["stem"], model.sgs["stem"].width.clone()
    model.train()
    state = torch.random.get_rng_state()
    try:
        layer.width.mul_(10)
        (after,) = merge_pictures(model, clips, **draw)
        assert all(module.training for module in model.modules()) and torch.equal(state, torch.random.get_rng_state())
    finally:
        layer.width.copy_(width)
        model.eval()
    assert after.size == before.size and not np.array_equal(after, before)


def test_shown_clips_are_of_as_many_classes_as_possible():
    def videos(labels: str) -> list[Video]:
        return [Video(str(number), int(label)) for number, label in enumerate(labels)]

    assert spread(videos("0011223344"), 4) == [0, 2, 4, 6]
    assert spread(videos("0123456789"), 2) == [0, 5]
    assert spread(videos("000111"), 4) == [0, 3, 1, 4]
    assert spread(videos("000111"), 4, without={0, 3}) == [1, 4, 2, 5]
    assert spread(videos("01"), 4) == [0, 1]


def test_charts_of_many_clips_have_no_bar_or_line_that_cannot_be_drawn():
    names = [f"class {number}" for number in range(400)]
    for rate in (0.0025, 0.3):
        counts = np.random.default_rng(0).binomial(50, rate, (400, 400)) + np.eye(400, dtype=int)
        counts[7] *= 1000
        assert class_accuracy_picture(counts, names).width > 0 and confusion_picture(counts, names).width > 0
    for total in (9_999, 20_000, 1_000_000):
        clips = np.zeros(9, dtype=int)
        clips[4] = total
        for right in (0, 1, total // 400, total):
            picture = accuracy_by_bins_picture([clips * right // total], [clips], ["stem"])
            blue = (np.array(picture) == [0x4C, 0x78, 0xC8]).all(axis=2).any(axis=1).sum()  # height of the bar
            assert blue == pytest.approx(220 * right / total, abs=1)


@pytest.mark.slow
def test_a_picture_that_cannot_be_drawn_costs_neither_the_validation_nor_the_results(videos, tmp_path, monkeypatch, capfd):
    def fails(*_: object, **__: object) -> None:
        raise ValueError("no ink")

    monkeypatch.setattr("atfr.viz.clips.merge_picture", fails)
    monkeypatch.setattr("atfr.engine.run.metric_logger.add_validation", fails)
    outcome = run_tool("train", *small_job(videos, tmp_path, "model/sgs=uniform", "model.sgs.keep_ratio=0.5", "trainer.tensorboard_pictures=1", "trainer.examples=1", "trainer.epochs=1"))
    assert outcome.code == 0, outcome.err
    assert "TensorBoard lacks pictures of this validation: ValueError: no ink" in outcome.err + outcome.out
    assert f"{tmp_path} has no examples: ValueError: no ink" in outcome.err + outcome.out
    assert (tmp_path / "checkpoints/best.pt").exists() and (tmp_path / "results.json").exists()
