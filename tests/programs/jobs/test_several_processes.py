"""Training and testing with several processes."""

from __future__ import annotations

import json

import pytest
from forked import Job
from predictions import rows
from run_tools import run_tool, small_job, torchrun


@pytest.mark.parametrize("views", ["eight", pytest.param("two", marks=pytest.mark.slow)])
@pytest.mark.parametrize("world", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_any_number_of_processes_evaluates_each_view_exactly_once_and_alike(trained, small_videos, tmp_path, world, views):
    """Eight views of four videos, which three processes cannot share evenly, or two of two videos, of which the third has none."""
    best, several, more, alone, count = f"checkpoint={trained[0]}/checkpoints/best.pt", tmp_path / "several", [], trained[0], 8
    if views == "two":
        entries = (small_videos / "test.csv").read_text().splitlines()
        (tmp_path / "two.csv").write_text("\n".join(entries[:3]) + "\n")
        more, alone, count = [f"dataset.test={tmp_path / 'two.csv'}", "dataset.clip.views=1"], tmp_path / "alone", 2
        assert run_tool("test", best, *more, f"trainer.output_dir={alone}").code == 0
    job = Job("test", best, *more, f"trainer.output_dir={several}", processes=world, output=tmp_path / "said.txt")
    assert set(job.wait()) == {0}, (tmp_path / "said.txt").read_text()
    expected, results = (json.loads((folder / "results.json").read_text()) for folder in (alone, several))
    assert len(rows(alone)) == expected["num_views"] == count
    for row, other in zip(rows(alone), rows(several), strict=True):
        assert {**row, "score": ""} == {**other, "score": ""}
        assert float(row["score"]) == pytest.approx(float(other["score"]), abs=2e-4)  # clips that are packed with others: float32 sums in another order
    for key in ("top1", "top5", "mean_class_accuracy", "num_videos", "num_views", "failed", "bins"):
        assert expected[key] == results[key]


@pytest.mark.slow
def test_warnings_about_the_lists_are_printed_once_by_any_number_of_processes(trained, small_videos, tmp_path):
    lines = (small_videos / "test.csv").read_text().splitlines()
    (tmp_path / "test.csv").write_text("\n".join([*lines, lines[1]]) + "\n")
    more = (f"dataset.test={tmp_path}/test.csv", f"trainer.output_dir={tmp_path / 'run'}")
    outcome = torchrun(2, "test", f"checkpoint={trained[0]}/checkpoints/best.pt", *more)
    assert outcome.code == 0, outcome.err
    warnings = [line for line in outcome.out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and f"{tmp_path}/test.csv:2: {small_videos}/" in warnings[0] and "is listed 2 times" in warnings[0]
    assert json.loads((tmp_path / "run/results.json").read_text())["num_videos"] == 5


@pytest.mark.slow
def test_two_processes_train_with_everything_that_augments(small_videos, tmp_path):
    more = ("trainer.class_balanced=true", "trainer.mixup=0.8", "trainer.cutmix=1.0", "dataset.clip.randaugment=[2,9]", "dataset.clip.fps=30")
    outcome = torchrun(2, "train", *small_job(small_videos, tmp_path, *more))
    assert outcome.code == 0, outcome.err
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2, 3, 4]
    assert len(rows(tmp_path)) == 8
