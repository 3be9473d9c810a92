"""tools/predict.py and the classifier behind it, on a network that was trained for a few steps."""

from __future__ import annotations

import csv
import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from run_tools import ROOT, Outcome, run_tool, small_job

import atfr
from atfr.cli.classifier import Classification
from atfr.cli.predict import Writer, find_videos, picture_files
from atfr.data.clips import TestClips
from atfr.data.types import Video, VideoError


@pytest.fixture(scope="module")
def trained(small_videos, tmp_path_factory) -> dict[str, Path]:
    """Run folders of a network with SGS and of one without."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("x3d_sgs", "x3d")}
    for name, folder in folders.items():
        more = ["model.sgs.keep_ratio=0.5", "dataset.clip.frames=4"] if name == "x3d_sgs" else ["trainer.statistics_clips=0"]
        outcome = run_tool("train", *small_job(small_videos, folder, f"model={name}", *more, "trainer.max_steps=2", "trainer.test=false"))
        assert outcome.code == 0, outcome.err
    return folders


def predict(folder: Path, video: object, *more: str) -> Outcome:
    return run_tool("predict", f"checkpoint={folder}", f"video={video}", "device=cpu", *more)


def test_a_folder_is_classified_as_each_video_is_alone(trained, small_videos):
    classifier = atfr.load(trained["x3d_sgs"], device="cpu")
    outcome = predict(trained["x3d_sgs"], small_videos, "format=jsonl", "batch_size=5")
    assert outcome.code == 0, outcome.err
    rows = [json.loads(line) for line in outcome.out.splitlines()]
    assert [row["video"] for row in rows] == [str(path) for path in sorted(small_videos.glob("*.mp4"))]
    for row in rows[::5]:
        alone = classifier(row["video"])
        assert [one["label"] for one in row["classes"]] == list(alone.labels)
        assert [one["probability"] for one in row["classes"]] == pytest.approx(alone.probabilities, abs=1e-5)
        assert row["bins"] == ["/".join(map(str, bins)) for bins in alone.bins] and row["gflops"] == pytest.approx(alone.gflops)


def test_results_are_written_as_a_table_csv_or_json_lines():
    result = Classification("a, b.mp4", ("down", "right"), (0.75, 0.25), ((3, 2), (4, 4)), 1.5, 2.0)
    table, rows, line = (Writer(form).header() + Writer(form).result(result) for form in ("table", "csv", "jsonl"))
    assert table == f"{result}\n" == "a, b.mp4  (1.5 of 2 GFLOPs a view; B' 3/2 4/4)\n   75.0 %  down\n   25.0 %  right\n"
    expected = {"video": "a, b.mp4", "bins": "3/2 4/4", "gflops": "1.5", "dense_gflops": "2"}
    assert list(csv.DictReader(rows.splitlines())) == [
        {**expected, "rank": "1", "label": "down", "probability": "0.7500"}, {**expected, "rank": "2", "label": "right", "probability": "0.2500"},
    ]  # fmt: skip
    classes = [{"label": "down", "probability": 0.75}, {"label": "right", "probability": 0.25}]
    assert json.loads(line) == {"video": "a, b.mp4", "classes": classes, "bins": ["3/2", "4/4"], "gflops": 1.5, "dense_gflops": 2.0}


def test_the_demo_says_whether_sgs_changed_the_answer(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    verdict = runpy.run_path(str(ROOT / "scripts/demo.py"))["verdict"]
    dense, same, other = (Classification("a.mp4", labels, (0.75, 0.25), ((8,),), gflops, 2.0) for labels, gflops in ((("x", "y"), 2.0), (("x", "z"), 1.0), (("y", "x"), 0.5)))
    assert verdict(dense, same) == "The first answer is the same with 50% of the GFLOPs; its probability is 75% instead of 75%."
    assert verdict(dense, other).startswith("The first answer is another with 25% of the GFLOPs: y instead of x.")


def test_scores_are_the_mean_over_the_views(trained, small_videos):
    path = str(small_videos / "right 0.mp4")
    classifier = atfr.load(trained["x3d"], device="cpu")
    views = TestClips([Video(path, 0)], classifier.clip, views=2, crops=1)
    with torch.inference_mode():
        scores = torch.stack([classifier.model((view.clip[None] / 255 - 0.45) / 0.225)[0].softmax(0) for view in (views[0], views[1])]).mean(0)
    found = classifier(path)
    assert dict(zip(found.labels, found.probabilities)) == pytest.approx(dict(zip(classifier.class_names, scores.tolist())), abs=1e-4)
    assert found.gflops == found.dense_gflops and found.bins == ((8,), (8,))


def test_what_cannot_be_read_is_listed_and_the_rest_is_done(trained, small_videos, tmp_path):
    shutil.copy(small_videos / "down 1.mp4", tmp_path / "b.mp4")
    for name in ("a.mp4", "c.mp4"):
        (tmp_path / name).write_bytes(b"no video")
    outcome = predict(trained["x3d"], tmp_path, "format=csv", f"output={tmp_path / 'found.csv'}")
    assert outcome.code == 0 and outcome.out == f"1 video in {tmp_path / 'found.csv'}\n"
    assert {row["video"] for row in csv.DictReader((tmp_path / "found.csv").open())} == {str(tmp_path / "b.mp4")}
    assert [line.partition(": ")[0] for line in outcome.err.splitlines() if line.startswith("cannot")] == [f"cannot read {tmp_path / name}" for name in ("a.mp4", "c.mp4")]
    rows = [json.loads(line) for line in predict(trained["x3d"], tmp_path, "format=jsonl").out.splitlines()]
    assert {Path(row["video"]).name: "error" in row for row in rows} == {"a.mp4": True, "b.mp4": False, "c.mp4": True}
    outcome = predict(trained["x3d"], tmp_path / "a.mp4")
    assert outcome.code == 1 and outcome.err.endswith("error: none of the 1 videos could be read\n")
    with pytest.raises(VideoError, match="a.mp4"):
        atfr.load(trained["x3d"], device="cpu")(tmp_path / "a.mp4")


def test_a_timeline_has_a_window_every_hop_and_its_picture(trained, small_videos, tmp_path):
    """The videos have 24 frames at 10 a second."""
    outcome = predict(trained["x3d"], small_videos / "down 1.mp4", "window_s=0.8", "hop_s=0.4", "format=jsonl", f"pictures={tmp_path}")
    assert outcome.code == 0, outcome.err
    rows = [json.loads(line) for line in outcome.out.splitlines()]
    assert [row["start_s"] for row in rows] == pytest.approx([0, 0.4, 0.8, 1.2, 1.6])
    assert all(row["end_s"] - row["start_s"] == pytest.approx(0.8) for row in rows)
    assert Image.open(tmp_path / "down 1.png").width > 1000
    # The end of a video is in a window, too: three at 0, .55 and 1.1 s.
    outcome = predict(trained["x3d"], small_videos / "down 1.mp4", "window_s=1.3", "hop_s=0.8", "format=jsonl", "top=1")
    rows = [json.loads(line) for line in outcome.out.splitlines()]
    assert [row["start_s"] for row in rows] == pytest.approx([0, 0.55, 1.1]) and rows[-1]["end_s"] == pytest.approx(2.4)
    assert all(len(row["classes"]) == 1 for row in rows)


@pytest.mark.slow
def test_a_budget_at_prediction_time_changes_what_is_kept(trained, small_videos):
    outcome = predict(trained["x3d_sgs"], small_videos, "gflops=0.6", "format=jsonl", "views=1")
    assert outcome.code == 0, outcome.err
    costs = [row["gflops"] / row["dense_gflops"] for row in map(json.loads, outcome.out.splitlines())]
    assert 0.5 < sum(costs) / len(costs) <= 0.6
    assert f"gflops=0.6: {sum(costs) / len(costs):.0%} of the dense GFLOPs on the 12 videos" in outcome.err
    outcome = predict(trained["x3d"], small_videos, "gflops=0.6")
    assert outcome.code == 1 and "has no SGS layer whose budget gflops=0.6 could set: add sgs=atfr" in outcome.err


@pytest.mark.slow
def test_a_network_without_sgs_takes_a_preset_and_its_pictures_show_it(trained, small_videos, tmp_path):
    outcome = predict(trained["x3d"], small_videos / "down 1.mp4", "sgs=atfr", "after=stem", "gflops=0.6", f"pictures={tmp_path}", "format=jsonl")
    assert outcome.code == 0, outcome.err
    row = json.loads(outcome.out)
    assert row["gflops"] < row["dense_gflops"]
    assert Image.open(tmp_path / "down 1.png").width > 1000


@pytest.mark.parametrize(
    "more,message",
    [
        (["video=/nowhere"], "error: video=/nowhere does not exist, and no file fits it as a pattern"),
        (["checkpoint=/nowhere", "video=x"], "error: video=x does not exist"),
        (["top=0"], "error: top=0 must be above 0"),
        (["format=xml"], "error: format=xml does not exist; choose one of table, csv, jsonl"),
        (["sgs=atfr", "gflops=0.5"], "has SGS of its own; leave out sgs=atfr"),
        (["sgs=atfr"], "error: sgs=atfr needs a budget: add gflops=0.5"),
        (["gflops=50"], "error: gflops=50 must be above 0 and at most 1"),
        (["hop_s=1"], "error: hop_s is the distance between windows: set window_s, too"),
        (["top=x"], "error: top='x' is not of type int"),
        (["tops=3"], "error: tops is not an option; did you mean top?"),
    ],
)
def test_wrong_options_are_answered_in_one_line(trained, small_videos, more, message):
    outcome = predict(trained["x3d_sgs"], small_videos / "down 1.mp4", *more)
    assert outcome.code == 1 and message in outcome.err and outcome.err.count("\n") == 1, outcome.err


def test_videos_are_found_by_name_folder_and_pattern_each_once(tmp_path):
    for name in ("a.mp4", "b.AVI", "sub/c.webm", "d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [str(tmp_path / name) for name in ("a.mp4", "b.AVI", "sub/c.webm")]
    assert find_videos(str(tmp_path)) == names
    assert find_videos([str(tmp_path / "*.mp4"), str(tmp_path)]) == names
    assert find_videos(str(tmp_path / "d.txt")) == [str(tmp_path / "d.txt")]  # a name is taken as it is
    with pytest.raises(ValueError, match="holds no file with one of the endings .mp4"):
        (tmp_path / "empty").mkdir()
        find_videos(str(tmp_path / "empty"))


def test_pictures_of_videos_of_one_name_do_not_overwrite_each_other():
    files = picture_files(["x/a.mp4", "y/a.mp4", "y/b.mp4"], Path("p"))
    assert [file.name for file in files.values()] == ["a.png", "a-2.png", "b.png"]
