"""The tables of the page and the CSV file: the numbers of the run folders, and how runs are grouped, named and compared."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from statistics import mean, stdev

import pytest
from report_pages import report, results_of, write_run

from atfr.models.sgs.config import SGSConfig
from atfr.report.compare import differing, kind, method, short_names


def test_the_numbers_of_the_page_are_those_of_the_files(sweep, shown):
    rows = shown[0].table("runs")
    found = {re.sub(r".*/", "", row[1][0]): [value for _, value in row[3:]] for row in rows}  # by the folder's name
    for name in ("dense", "atfr 0.7", "atfr 0.3", "uniform", "stride"):
        results = results_of(sweep / name)
        share = 100 * results["gflops"]["mean"] / results["gflops"]["dense"]
        expected = [*(results[key] for key in ("top1", "top5", "mean_class_accuracy")), results["gflops"]["mean"], share, results["bins"]["mean"], results["clips_per_second"]]
        assert found[name] == pytest.approx(expected, rel=1e-12)
    assert [row[3][1] for row in rows] == sorted((row[3][1] for row in rows), reverse=True)
    assert {"80.50", "90.08", "79.25", "0.013", "32.5", "50.0"} <= set(shown[0].bold)


def test_runs_that_differ_in_the_seed_are_one_row_with_mean_and_standard_error(sweep, shown):
    top1 = [results_of(sweep / f"atfr 0.5 seed {seed}")["top1"] for seed in range(3)]
    row = next(row for row in shown[0].table("runs") if row[2][0] == "0, 1, 2")
    assert row[3][1] == pytest.approx(mean(top1))
    assert row[3][0] == f"{mean(top1):.2f} ± {stdev(top1) / math.sqrt(3):.2f}"
    assert "and 2 more" in row[1][0]
    with open(shown[2] / "runs.csv", newline="") as file:
        line = next(line for line in csv.DictReader(file) if line["seeds"] == "0;1;2")
    assert [Path(run) for run in line["runs"].split(";")] == [sweep / f"atfr 0.5 seed {seed}" for seed in range(3)]
    assert float(line["top1_standard_error"]) == pytest.approx(stdev(top1) / math.sqrt(3))


def test_the_csv_is_the_first_table(sweep, shown):
    with open(shown[2] / "runs.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    keys = ("top1", "top5", "mean_class_accuracy", "gflops", "gflops_percent_of_dense", "bins", "clips_per_second")
    assert [[float(line[key]) for key in keys] for line in lines] == [[value for _, value in row[3:]] for row in shown[0].table("runs")]
    assert [line["option.gflops"] for line in lines] == ["", "0.7", "0.5", "0.5", "0.5", "0.3"]
    assert [line["method"] for line in lines] == ["dense", "atfr", "atfr", "uniform", "stride", "atfr"]
    assert lines[0]["runs"] == str(sweep / "dense")


def test_the_same_experiment_run_twice_is_two_rows(tmp_path):
    write_run(tmp_path / "one", seed=3)
    write_run(tmp_path / "two", seed=3, trainer={"workers": 8})
    page, _, _ = report(tmp_path, folder=tmp_path)
    assert [row[1][0].split(" /")[0] for row in page.table("runs")] == ["atfr (one)", "atfr (two)"]


def test_classes_have_the_accuracy_and_the_cost_of_predictions_csv(sweep, shown):
    with open(sweep / "atfr 0.7" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    head, *lines = shown[0].tables[shown[0].ids["classes-table"]]
    at = [text for text, _ in head].index("#2 % right")
    assert [line[0][0] for line in lines] == ["jump", "run"]
    for line in lines:
        own = [row for row in rows if row["label"] == line[0][0]]
        assert line[1][1] == len(own)
        assert line[at][1] == pytest.approx(100 * mean(row["label"] == row["prediction"] for row in own))
        assert line[at + 1][1] == pytest.approx(mean(float(row["gflops"]) for row in own))


def test_only_what_distinguishes_runs_is_named():
    def config(similarity, **options):
        sgs = SGSConfig.from_preset(similarity, **options).used_options()
        return {"model._target_": "x.x3d", "trainer.workers": 1, "trainer.seed": 0, **{f"model.sgs.{key}": value for key, value in sgs.items()}}

    one, two, uniform = config("atfr"), config("atfr", gflops=0.7), config("uniform")
    dense = {"model._target_": "x.x3d", "model.sgs": None, "trainer.workers": 3, "trainer.seed": 1}
    assert differing([one, two, uniform, dense]) == ["model.sgs.gflops"]
    assert differing([one, uniform, dense]) == []
    assert differing([one, config("glance")]) == [] and [method(c) for c in (one, config("glance"), uniform, dense)] == ["atfr", "glance", "uniform", "dense"]
    assert differing([one, config("atfr", keep_ratio=0.5)]) == ["model.sgs.gflops", "model.sgs.keep_ratio"]
    assert differing([one, config("atfr", grid=8)]) == ["model.sgs.grid"]
    equal = config("atfr", same_number=True), config("glance", same_number=True)
    assert differing([one, *equal]) == [] and [(method(c), kind(method(c))) for c in equal] == [("atfr-equal", "fixed"), ("glance-equal", "fixed")]
    assert differing([{**one, "optimizer.lr": 0.1}, {**two, "optimizer.lr": 0.2}]) == ["model.sgs.gflops", "optimizer.lr"]
    assert differing([one, {**one, "model._target_": "x.slowfast"}]) == ["model._target_"]
    assert short_names(["trainer.seed", "dataset.seed", "model._target_", "a.lr"]) == {
        "trainer.seed": "trainer.seed",
        "dataset.seed": "dataset.seed",
        "model._target_": "model",
        "a.lr": "lr",
    }


def test_a_calibration_is_a_row_for_each_budget(tmp_path):
    run = write_run(tmp_path / "calibrated", sgs={"gflops": 0.5})
    entries = [{**results_of(run), "budget": budget, "top1": 100 * budget, "gflops": {"dense": 0.04, "mean": 0.04 * budget}} for budget in (0.4, 0.6)]
    (run / "calibration.json").write_text(json.dumps(entries))
    (run / "results.json").unlink()
    page, _, _ = report(run, folder=tmp_path)
    assert [(row[1][0].split(" /")[0], row[2][1]) for row in page.table("runs")] == [("atfr gflops=0.6", 60.0), ("atfr gflops=0.4", 40.0)]
    assert page.text.count("budget 0.6") == 1


def test_runs_that_were_tested_differently_are_not_compared_silently(tmp_path):
    write_run(tmp_path / "one", views=2)
    write_run(tmp_path / "two", views=10, seed=1)
    said = "were not tested in the same way, so their accuracies may not be comparable. See Protocol: views."
    page, _, _ = report(tmp_path, folder=tmp_path)
    assert len(page.table("runs")) == 2 and said in " ".join(page.text.split())
    assert "0123456789ab+" in page.text and "optimistic" not in page.text
    results = results_of(tmp_path / "one")
    results["protocol"].update(views=10, frames=8, validation="test list")
    (tmp_path / "one/results.json").write_text(json.dumps({**results, "failed": ["x.mp4"]}))
    page, _, _ = report(tmp_path, folder=tmp_path)
    text = " ".join(page.text.split())
    assert "comparable. See Protocol: validation." in text and "the test videos chose the best epoch" in text and "not counted (#1: 1)" in text
