"""The examples of a test: which clips are chosen, and what is listed and drawn of them."""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from monitored_run import CLASSES
from PIL import Image
from training import network

from atfr.data.clips import Clip, TestClips
from atfr.data.transforms import Normalizer
from atfr.data.types import Video
from atfr.engine.evaluator import View
from atfr.engine.examples import KINDS, choose_examples, write_examples


def view(video: int, number: int, *, label: int = 0, score: float = 0.9) -> View:
    """A clip whose prediction is class 0."""
    return View(video, number, f"{video}.mp4", label, np.array([score, 1 - score], dtype=np.float32), (1,))


def test_examples_are_the_cheapest_and_the_dearest_of_different_videos():
    rows = [(view(0, 0), 5.0), (view(0, 1), 1.0), (view(1, 0), 1.0), (view(1, 1), 9.0), (view(2, 0, score=0.95), 1.0), (view(3, 0, label=1), 2.0),
            (view(4, 0), 7.0), (view(5, 0, label=1), 8.0), (view(5, 1, label=1), 8.5), (view(6, 0), 6.0)]  # fmt: skip
    found = choose_examples([one for one, _ in rows], [cost for _, cost in rows], 2)
    assert [(kind, one.video, one.view, cost) for kind, one, cost in found] == [
        ("cheapest right", 2, 0, 1.0),  # the surest of those that cost the same
        ("cheapest right", 0, 1, 1.0),
        ("dearest right", 1, 1, 9.0),
        ("dearest right", 4, 0, 7.0),
        ("dearest wrong", 5, 1, 8.5),
        ("dearest wrong", 3, 0, 2.0),
    ]
    assert [kind for kind, _, _ in choose_examples([view(0, 0)], [1.0], 2)] == ["cheapest right"]
    assert choose_examples([one for one, _ in rows], [cost for _, cost in rows], 0) == []


def listed(folder: Path) -> list[dict]:
    """The entries of examples.json, whose files are PNGs, and the only ones."""
    entries = json.loads((folder / "examples/examples.json").read_text())
    assert {path.name for path in (folder / "examples").iterdir()} == {"examples.json", *(entry["file"] for entry in entries)}
    for entry in entries:
        with Image.open(folder / "examples" / entry["file"]) as picture:
            assert picture.format == "PNG" and picture.width > 1500 and picture.height > 300
    return entries


def test_a_test_lists_clips_of_its_predictions_and_draws_them(run):
    rows = {(row["video"], int(row["view"])): row for row in csv.DictReader((run / "predictions.csv").open())}
    entries = listed(run)
    assert entries and {entry["kind"] for entry in entries} <= set(KINDS)
    for entry in entries:
        assert list(entry) == ["kind", "video", "view", "label", "prediction", "score", "bins", "gflops", "file"]
        row = rows[entry["video"], entry["view"]]
        assert [row[name] for name in ("label", "prediction", "bins")] == [entry[name] for name in ("label", "prediction", "bins")]
        assert [float(row[name]) for name in ("score", "gflops")] == pytest.approx([entry["score"], entry["gflops"]], abs=1e-4)
        assert (entry["label"] == entry["prediction"]) == entry["kind"].endswith("right")
    for number, (kind, best) in enumerate(zip(KINDS, (min, max, max))):
        taken = {entry["video"] for entry in entries if entry["kind"] in KINDS[:number]}  # a video is shown once
        rest = [row for (video, _), row in rows.items() if video not in taken and (row["label"] == row["prediction"]) == kind.endswith("right")]
        found = [entry["gflops"] for entry in entries if entry["kind"] == kind]
        assert bool(found) == bool(rest) and (not found or found[0] == pytest.approx(best(float(row["gflops"]) for row in rest)))


def test_a_later_test_replaces_the_pictures(run, plain, videos, tmp_path):
    model, clip = plain.classifier.model, plain.classifier.clip
    clips = TestClips([Video(str(videos / f"{number}.mp4"), number % 3) for number in range(6, 15)], clip, views=2, crops=1)
    views = [View(i, 1, "", label, np.eye(3)[found], (bins,)) for i, (label, found, bins) in enumerate(zip(plain.labels, plain.predictions, plain.bins))]
    options = {"table": model.gflops_table((3, 8, 32, 32)), "normalise": Normalizer(clip.mean, clip.std), "class_names": CLASSES, "folder": tmp_path}
    for each in (3, 1, 0):
        write_examples(model, views, clips, each=each, **options)
        if each:
            assert max(Counter(entry["kind"] for entry in listed(tmp_path)).values()) == each
    assert not list((tmp_path / "examples").iterdir())


class Unreadable:
    """Clips of which only those of video 1 can be read."""

    views, crops = 3, 1

    def __getitem__(self, item: int) -> Clip:
        clip = torch.zeros(3, 8, 32, 32, dtype=torch.uint8) if item == 3 + 2 else None
        return Clip(clip, 0, item // 3, item % 3, f"{item // 3}.mp4", error=None if clip is not None else "the disk is gone")


def test_a_clip_that_cannot_be_read_again_is_left_out_and_a_dense_network_gets_none(plain, tmp_path, caplog):
    views = [replace(view(number, 2), bins=(plain.bins[0],)) for number in (0, 1)]
    model, options = plain.classifier.model, {"normalise": Normalizer([0.4] * 3, [0.2] * 3), "class_names": CLASSES, "folder": tmp_path}
    table = model.gflops_table((3, 8, 32, 32))
    write_examples(model, views, Unreadable(), each=2, table=table, **options)
    assert [entry["video"] for entry in listed(tmp_path)] == ["1.mp4"] and "no example of 0.mp4: the disk is gone" in caplog.text
    write_examples(network(), views, Unreadable(), each=2, table=table, **options)
    assert not list((tmp_path / "examples").iterdir())
