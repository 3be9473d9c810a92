"""Accuracies, tables and files from views made by hand."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from atfr.data.types import Unreadable
from atfr.engine.evaluator import Evaluation, View
from atfr.engine.metrics import accuracy, as_table, summarise, write_predictions, write_results


class Table:
    """Ten GFLOPs per bin."""

    dense = 160.0

    def at(self, bins):
        return 10.0 * bins[0]


def view(video, number, label, scores, bins=4):
    return View(video, number, f"v{video}.mp4" if video else "caf\udce9.mp4", label, np.array(scores, dtype=np.float32), (bins,))


def test_the_scores_of_a_videos_views_are_averaged_before_the_decision():
    views = [
        view(0, 0, 0, [0.4, 0.6, 0.0]),
        view(0, 1, 0, [0.9, 0.1, 0.0]),  # together class 0: right
        view(1, 0, 1, [0.5, 0.2, 0.3]),  # class 0: wrong
        view(2, 0, 0, [0.1, 0.8, 0.1]),  # class 1: wrong
        view(3, 0, 2, [0.1, 0.1, 0.8]),  # right
    ]
    values = accuracy(views)
    assert values["top1"] == pytest.approx(50.0)
    assert values["mean_class_accuracy"] == pytest.approx(100 * (0.5 + 0 + 1) / 3)
    assert values["top5"] == pytest.approx(100.0)


def test_top5_counts_a_label_among_the_five_best_of_many_classes():
    scores = [0.3, 0.2, 0.15, 0.12, 0.1, 0.08, 0.05]
    assert accuracy([view(0, 0, 4, scores)])["top5"] == 100.0
    assert accuracy([view(0, 0, 5, scores)])["top5"] == 0.0


BAD = {2: Unreadable(2, "bad.mp4", "no video stream")}


def evaluation():
    views = [view(0, 0, 0, [0.9, 0.1], 4), view(0, 1, 0, [0.2, 0.8], 16), view(1, 0, 1, [0.3, 0.7], 1)]
    decoders = {0: "pyav", 1: "decord", 2: "pyav"}  # one view of the bad one was read
    return Evaluation(views=views, failed=BAD, decoders=decoders, frames=(16,), network_seconds=1.5)


def test_the_results_have_the_documented_keys(tmp_path):
    results = summarise(evaluation(), Table(), protocol={"dataset": "toy"})
    assert results["num_videos"] == 2 and results["num_views"] == 3 and results["failed"] == ["bad.mp4"]
    gflops = results["gflops"]
    assert (gflops["dense"], gflops["min"], gflops["max"]) == (160.0, 10.0, 160.0)
    assert gflops["mean"] == pytest.approx(70.0)
    assert "fvcore" in gflops["convention"]
    assert results["bins"] == {"mean": 7.0, "min": 1, "max": 16, "frames": 16, "histogram": {"1": 1, "4": 1, "16": 1}}
    assert results["clips_per_second"] == pytest.approx(2.0)
    assert results["protocol"].keys() == {"dataset", "failed", "decoders", "commit"}
    assert results["protocol"]["decoders"] == {"pyav": 1, "decord": 1}
    assert json.loads(write_results(results, tmp_path).read_text()) == results
    text = as_table(results, folder=tmp_path)
    for part in ("2 (1 more could not be read) / 3", "min 1, max 16 of 16", "tensorboard --logdir"):
        assert part in text


def test_predictions_have_a_row_for_each_view(tmp_path):
    path = write_predictions(evaluation(), Table(), tmp_path, class_names=["run", "jump, high"])
    rows = list(csv.DictReader(path.open(errors="surrogateescape")))
    assert list(rows[0]) == ["video", "view", "label", "prediction", "score", "bins", "gflops"]
    assert [(r["video"], r["view"], r["label"], r["prediction"], r["bins"], r["gflops"]) for r in rows] == [
        ("caf\udce9.mp4", "0", "run", "run", "4", "40"),
        ("caf\udce9.mp4", "1", "run", "jump, high", "16", "160"),
        ("v1.mp4", "0", "jump, high", "jump, high", "1", "10"),
    ]


def test_when_no_video_could_be_read_there_is_no_accuracy():
    with pytest.raises(ValueError, match="none of the 1 videos could be read.*bad.mp4: no video stream"):
        summarise(Evaluation(failed=BAD), Table(), protocol={})
