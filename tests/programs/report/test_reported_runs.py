"""Which run folders tools/report.py finds, and what it says of those without results."""

from __future__ import annotations

import json
import os
import re
import shutil
import time

import yaml
from report_pages import report, results_of, write_run
from run_tools import run_tool


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
