"""tools/report.py: the page says what the run folders say."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from configparser import ConfigParser
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean, stdev

import pytest
import yaml
from omegaconf import OmegaConf
from PIL import Image
from run_tools import ROOT, Outcome, run_tool, small_job

from atfr.cli.sweep import NamesReport
from atfr.models.sgs.config import SGSConfig
from atfr.models.sgs.functional import BASELINES
from atfr.report.compare import FIXED, differing, method, pareto, short_names

NASTY = '<b>&"\' $x$'
VOID = {"meta", "input", "img", "link", "br", "hr"}
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Parsed(HTMLParser):
    """A page's elements, its text outside scripts and styles, and its tables as rows of (text, value to sort by)."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.tables: list[list[list[tuple[str, float | None]]]] = []
        self.ids: dict[str, int] = {}  # of tables
        self.bold: list[str] = []
        self._best = False
        self.feed(page)
        assert self.open == [], "elements that are not closed"

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.elements.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.ids[found.get("id") or f"table {len(self.tables)}"] = len(self.tables)
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            value = found.get("data-value")
            self.tables[-1][-1].append(("", None if value is None else float(value)))
            self._best = "best" in (found.get("class") or "")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if "style" in self.open or "script" in self.open:
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            text, value = self.tables[-1][-1][-1]
            self.tables[-1][-1][-1] = (f"{text} {data.strip()}".strip(), value)
            if self._best and data.strip():
                self.bold.append(data.strip())

    def table(self, name: str) -> list[list[tuple[str, float | None]]]:
        """The rows of a table, without its head."""
        return self.tables[self.ids[f"{name}-table"]][1:]


def write_run(folder: Path, *, top1=50.0, gflops=0.02, speed=40.0, seed=0, similarity="partition", name="a", classes=("run", "jump"), views=2, **options) -> Path:
    """Write a run folder as tools/train.py does; similarity None: a dense network."""
    folder.mkdir(parents=True)
    sgs = None if similarity is None else {"_target_": "atfr.models.sgs.config.SGSConfig", "similarity": similarity, **options.pop("sgs", {"gflops": 0.5})}
    model = {"sgs": sgs, "_target_": "atfr.models.backbones.x3d.x3d", "size": "tiny", **options.pop("model", {})}
    trainer = {"epochs": 4, "seed": seed, "output_dir": None, "workers": 2, "max_steps": None, **options.pop("trainer", {})}
    config = {"dataset": {"_target_": "atfr.data.datasets.videolist.videolist", "clip": {"frames": 16}}, "model": model, "trainer": trainer, **options}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "test_config.yaml").write_text(yaml.safe_dump(config))
    results = {
        "top1": top1, "top5": 90.0 + top1 / 1000, "mean_class_accuracy": top1 - 1.25, "num_videos": 50, "num_views": 50 * views, "failed": [],
        "gflops": {"dense": 0.04, "mean": gflops, "min": gflops / 2, "max": gflops * 1.5, "convention": "fvcore"},
        "bins": {"mean": 400 * gflops, "min": 1, "max": 16, "frames": 16, "histogram": {"4": 30, "9": 70}},
        "clips_per_second": speed,
        "protocol": {"views": views, "dataset": name, "checkpoint": str(folder / "checkpoints/best.pt"), "model": model, "commit": "0123456789abcdef0123+"},
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    rows = [f"v{i}.mp4,0,{label},{classes[i % 3 % len(classes)]},0.9,{4 + i % 3},{0.01 * (1 + i % 3)}" for i, label in enumerate(_quoted(classes) * 6)]
    (folder / "predictions.csv").write_text("\n".join(["video,view,label,prediction,score,bins,gflops", *rows]) + "\n")
    metrics = [{"step": step, "epoch": (step - 1) // 10, "split": "train", "loss": 3 - step / 20} for step in range(2, 41, 2)]
    metrics += [{"step": step, "epoch": (step - 1) // 10, "split": "val", "top1": step} for step in (10, 20, 30, 40)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in sorted(metrics, key=lambda line: line["step"])))
    return folder


def _quoted(names) -> list[str]:
    return ['"' + name.replace('"', '""') + '"' for name in names]


def report(*paths: Path | str, folder: Path) -> tuple[Parsed, str, Outcome]:
    """The page about these paths, its source, and what the program said."""
    outcome = run_tool("report", *map(str, paths), "--output", str(folder / "report.html"), "--csv", str(folder / "runs.csv"))
    assert outcome.code == 0, outcome.err
    page = (folder / "report.html").read_text(encoding="utf-8")
    return Parsed(page), page, outcome


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """Dense, three budgets of which one has three seeds, and two baselines."""
    top = tmp_path_factory.mktemp("sweep")
    write_run(top / "dense", similarity=None, top1=80.5, gflops=0.04, speed=21.5)
    for seed, top1 in enumerate((71.5, 74.25, 76.0)):
        write_run(top / f"atfr 0.5 seed {seed}", top1=top1, gflops=0.02 + seed / 1000, seed=seed, speed=40.0 + seed)
    write_run(top / "atfr 0.7", top1=79.75, gflops=0.028, speed=30.0, sgs={"gflops": 0.7})
    write_run(top / "atfr 0.3", top1=61.0, gflops=0.013, speed=50.0, sgs={"gflops": 0.3})
    write_run(top / "uniform", top1=70.0, gflops=0.021, speed=41.0, similarity="uniform")
    write_run(top / "stride", top1=66.0, gflops=0.021, speed=43.0, similarity="stride")
    return top


@pytest.fixture(scope="module")
def shown(sweep, tmp_path_factory) -> tuple[Parsed, str, Path]:
    folder = tmp_path_factory.mktemp("report")
    page, source, _ = report(sweep, folder=folder)
    return page, source, folder


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


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


def test_the_pareto_front_is_that_of_a_naive_loop():
    rng = random.Random(0)
    for _ in range(50):
        points = [(rng.randrange(8) / 4, float(rng.randrange(8))) for _ in range(rng.randrange(1, 20))]

        def beaten(point):
            return any(other != point and other[0] <= point[0] and other[1] >= point[1] for other in points)

        front = pareto(points)
        assert sorted(front) == [index for index, point in enumerate(points) if not beaten(point)]
        assert [points[index] for index in front] == sorted(points[index] for index in front)


def test_the_front_and_what_it_buys_are_in_the_page(shown):
    front = next(rows for rows in shown[0].tables if rows[0][-1][0].startswith("More top-1"))[1:]
    assert [row[1][0] for row in front] == ["atfr gflops=0.3", "atfr gflops=0.5", "atfr gflops=0.7", "dense"]
    assert front[2][4][1] == pytest.approx(100 * (0.028 / 0.021 - 1))
    assert front[3][5][1] == pytest.approx(80.5 - 79.75)


def test_each_run_is_a_labelled_point_in_both_figures(shown):
    titles = re.findall(r"<title>(\d) ([^<]+): top-1 ([\d.]+)[^<]*?, ([\d.]+)[^<]* (GFLOPs|ms)</title>", shown[1])
    for unit in ("GFLOPs", "ms"):
        assert {int(number) for number, *_, of in titles if of == unit} == {1, 2, 3, 4, 5, 6}
    dense = {unit: float(cost) for _, label, _, cost, unit in titles if label == "dense"}
    assert dense == {"GFLOPs": 0.04, "ms": pytest.approx(1000 / 21.5, rel=1e-3)}
    assert "Pareto front" in shown[0].text and "% of the dense network" in shown[0].text
    for label in ("1 dense", "2 atfr gflops=0.7", "4 uniform gflops=0.5", "uniform: the same B' for all clips"):
        assert label in shown[0].text


def test_baselines_have_their_own_symbols():
    assert set(FIXED) == set(BASELINES) - {"none"}


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
    assert differing([{**one, "optimizer.lr": 0.1}, {**two, "optimizer.lr": 0.2}]) == ["model.sgs.gflops", "optimizer.lr"]
    assert differing([one, {**one, "model._target_": "x.slowfast"}]) == ["model._target_"]
    assert short_names(["trainer.seed", "dataset.seed", "model._target_", "a.lr"]) == {
        "trainer.seed": "trainer.seed",
        "dataset.seed": "dataset.seed",
        "model._target_": "model",
        "a.lr": "lr",
    }


def test_names_are_escaped_everywhere(tmp_path):
    write_run(tmp_path / NASTY, classes=(NASTY, "jump"), model={"size": NASTY}, name=NASTY)
    write_run(tmp_path / "other", model={"size": NASTY + "2"}, similarity="<i>")
    (tmp_path / "\udcff<u>").mkdir()
    (tmp_path / "\udcff<u>" / "config.yaml").write_text("trainer: {epochs: 3}")
    page, source, _ = report(tmp_path, folder=tmp_path)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("i") == tags.count("u") == 0 and "<b>&" not in source
    for text in (f"size={NASTY}", str(tmp_path / NASTY), "<i> ", "\\udcff<u>"):
        assert text in page.text
    assert NASTY in [row[0][0] for row in page.table("classes")]


def test_runs_without_results_are_listed_with_the_reason(sweep, tmp_path):
    good = write_run(tmp_path / "runs/good")
    for name in ("tested", "stopped", "early", "limited", "damaged", "half", "lacking", "running", "killed", "empty"):
        write_run(tmp_path / "runs" / name)
        (tmp_path / "runs" / name / "checkpoints").mkdir()
        (tmp_path / "runs" / name / "checkpoints/last.pt").touch()
    folders = {name: tmp_path / "runs" / name for name in os.listdir(tmp_path / "runs")}
    for name in ("tested", "stopped", "early", "limited", "running", "killed", "empty"):
        (folders[name] / "results.json").unlink()
    (folders["tested"] / "checkpoints/best.pt").touch()
    for name, step in (("stopped", 24), ("early", 8), ("limited", 14), ("running", 24), ("killed", 24)):
        lines = (folders[name] / "metrics.jsonl").read_text().splitlines(keepends=True)
        (folders[name] / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= step) + '{"step": 2')
    config = yaml.safe_load((folders["limited"] / "config.yaml").read_text())
    config["trainer"]["max_steps"] = 14
    (folders["limited"] / "config.yaml").write_text(yaml.safe_dump(config))
    (folders["limited"] / "checkpoints/best.pt").touch()
    for name in ("running", "killed"):
        (folders[name] / "run.lock").write_text(json.dumps({"host": "node7", "pid": 12, "since": "today"}) + "\n")
    os.utime(folders["killed"] / "run.lock", (time.time() - 1000,) * 2)
    (folders["empty"] / "metrics.jsonl").unlink()
    shutil.rmtree(folders["empty"] / "checkpoints")
    (folders["damaged"] / "results.json").write_text('{"top1": 3')
    (folders["half"] / "results.json").write_text(json.dumps({**results_of(good), "top1": None}))
    (folders["lacking"] / "results.json").write_text(json.dumps({key: value for key, value in results_of(good).items() if key != "gflops"}))
    (good / "predictions.csv").write_text("video,view,label,prediction,score,bins,gflops\nv.mp4,0,a,a,0.5,four,0.1\n")
    page, _, outcome = report(tmp_path / "runs", tmp_path / "nothing", folder=tmp_path)
    assert "report of 1 run with results, 11 without" in outcome.out
    listed = next(rows for rows in page.tables if rows[0][1][0] == "Why it has no results")
    reasons = {re.sub(r".*/", "", row[0][0]): row[1][0] for row in listed[1:]}
    assert reasons == {
        "tested": f"trained to step 40 of 40; not tested: python tools/test.py checkpoint={folders['tested']}",
        "stopped": "trained to step 24 of 40; not finished: run its command again",
        "early": "trained to step 8, in epoch 1 of 4; not finished: run its command again",
        "limited": f"trained to step 14 of 40 (trainer.max_steps=14); not tested: python tools/test.py checkpoint={folders['limited']}",
        "running": "trained to step 24 of 40; running (process 12 on node7 since today)",
        "killed": "trained to step 24 of 40; killed (process 12 on node7 since today): run its command again",
        "empty": "no step in metrics.jsonl; no checkpoint was saved",
        "damaged": reasons["damaged"],
        "half": "results.json is damaged: top1 is None",
        "lacking": "results.json is damaged: it lacks gflops.mean",
        "nothing": "does not exist",
    }
    assert reasons["damaged"].startswith("results.json is damaged: Expecting")
    assert "predictions.csv is damaged after 0 clips: invalid literal for int() with base 10: 'four'" in page.text


def test_without_any_run_one_line_says_what_a_run_folder_holds(tmp_path):
    (tmp_path / "empty").mkdir()
    outcome = run_tool("report", str(tmp_path / "empty"), str(tmp_path / "no*"), "--output", str(tmp_path / "report.html"))
    assert outcome.code == 1 and outcome.out == "" and not (tmp_path / "report.html").exists()
    assert outcome.err.startswith(f"error: no run found: {tmp_path}/empty holds no run; {tmp_path}/no* does not exist. A run folder holds config.yaml")
    assert outcome.err.count("\n") == 1


def test_patterns_and_nested_folders_are_searched_and_no_run_is_twice(tmp_path):
    run = write_run(tmp_path / "a [1]" / "x3d")
    write_run(run / "runs/sweep/num_bins-4", sgs={"num_bins": 4})
    write_run(run / "checkpoints/never")
    write_run(tmp_path / "b/other")
    (run / "runs/up").symlink_to(tmp_path)
    page, _, _ = report(run, tmp_path / "*/x3d", tmp_path / "a [1]", folder=tmp_path)
    assert [re.sub(r".*/", "", row[1][0]) for row in page.table("runs")] == ["x3d", "num_bins-4", "other"]


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


def test_examples_are_inlined_and_those_that_cannot_be_read_are_left_out(tmp_path):
    folder = write_run(tmp_path / "run") / "examples"
    folder.mkdir()
    Image.effect_noise((900, 500), 60).convert("RGB").save(folder / "large.png")
    Image.new("RGB", (30, 20), "red").save(folder / "small.png")
    (folder / "damaged.png").write_bytes((folder / "small.png").read_bytes()[:40])
    shutil.copy(folder / "small.png", tmp_path / "run" / "outside.png")
    entry = {"kind": "dearest wrong", "video": "v <1>.mp4", "view": 0, "label": "run", "prediction": "jump", "score": 0.75, "bins": 9, "gflops": 0.03}
    files = ("large.png", "small.png", "damaged.png", "gone.png", "../outside.png")
    (folder / "examples.json").write_text(json.dumps([{**entry, "file": name} for name in files] + [{}]))
    page, source, _ = report(tmp_path / "run", folder=tmp_path)
    pictures = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    assert len(pictures) == 2 and all(picture.startswith("data:image/png;base64,") for picture in pictures)
    assert len(pictures[0]) * 3 / 4 < 0.9 * (folder / "large.png").stat().st_size
    assert "4 of 6 pictures of examples/ are missing or damaged" in page.text
    assert "dearest wrong: run, taken for jump (score 0.75), B' 9, 0.03 GFLOPsv <1>.mp4" in " ".join(page.text.split())


def test_the_page_needs_no_other_file(shown):
    for _, attributes in shown[0].elements:
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org)", shown[1])
    ids = [attributes["id"] for _, attributes in shown[0].elements if "id" in attributes]
    assert len(ids) == len(set(ids)) and set(re.findall(r'(?:href="#|url\(#)([^")]+)', shown[1])) <= set(ids)


def test_an_installed_wheel_has_the_template():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    pattern = config["options.package_data"]["atfr.report"]
    files = [path.relative_to(ROOT / "atfr/report") for path in (ROOT / "atfr/report").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert files and all(fnmatch(str(path), pattern) for path in files)


def test_tables_sort_and_filter_in_a_browser_without_errors(shown, tmp_path):
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    script = """
    const runs = document.getElementById("runs-table"), heads = runs.tHead.rows[0].cells, found = [];
    const order = () => [...runs.tBodies[0].rows].filter((row) => !row.hidden).map((row) => row.cells[0].textContent).join("");
    found.push(order());
    heads[6].click(); found.push(order());
    heads[6].click(); found.push(order());
    heads[1].click(); found.push(order());
    const filter = document.querySelector("[data-filter=runs-table]");
    filter.value = "ATFR 0.7"; filter.dispatchEvent(new Event("input")); found.push(order());
    const classes = document.querySelector("[data-filter=classes-table]");
    classes.value = "jum"; classes.dispatchEvent(new Event("input"));
    found.push([...document.querySelectorAll("#classes-table tbody tr")].map((row) => row.hidden).join());
    document.title = found.join(" ");
    """
    file = tmp_path / "page.html"
    file.write_text(shown[1].replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom", f"file://{file}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    rows = shown[0].table("runs")
    assert title is not None, done.stderr
    by_cost, by_label = (sorted(range(1, len(rows) + 1), key=lambda number: rows[number - 1][column][at]) for column, at in ((6, 1), (1, 0)))
    dearest_first = sorted(by_cost, key=lambda number: (-rows[number - 1][6][1], number))
    assert title[1].split() == ["".join(map(str, order)) for order in (range(1, len(rows) + 1), dearest_first, by_cost, by_label, [2])] + ["false,true"]
    assert "CONSOLE" not in done.stderr and "Refused" not in done.stderr


@pytest.mark.parametrize("overrides,said", [([], True), (["trainer.output_dir=x"], False), (["trainer.test=false"], False), (["dry_run=true"], False)])
def test_a_sweep_names_the_report_of_its_folder(overrides, said, capsys):
    config = OmegaConf.create({"hydra": {"job": {"name": "train"}, "overrides": {"task": ["trainer.seed=0,1", *overrides]}}})
    NamesReport().on_multirun_end(config)
    assert capsys.readouterr().out == ("report: python tools/report.py runs/sweep\n" if said else "")


def test_neither_torch_nor_hydra_is_imported():
    code = "import runpy, sys; runpy.run_path('tools/report.py'); print(*({'torch', 'hydra', 'omegaconf'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


def test_a_training_names_the_report_and_the_report_shows_it(small_videos, tmp_path):
    folder = tmp_path / "a run"
    trained = run_tool("train", *small_job(small_videos, folder, "model=x3d", "trainer.max_steps=1", "dataset.clip.views=1"))
    assert trained.code == 0, trained.err
    assert trained.out.splitlines()[-1] == f"report: python tools/report.py '{folder}'"
    page, _, _ = report(folder, folder=tmp_path)
    assert page.table("runs")[0][2][1] == results_of(folder)["top1"]
    assert not any("Why it has no results" in rows[0][-1][0] for rows in page.tables)
    assert "Files that could not be read" not in page.text
    assert "size: tiny" in page.text
