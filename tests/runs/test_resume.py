"""A command that is run again resumes: from the newest checkpoint that can be read, and only on the same lists."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from run_tools import run_tool, small_job

from atfr.engine.run import checkpoint


@pytest.mark.slow
def test_a_finished_run_is_only_tested_again_and_more_steps_go_on_from_its_end(small_videos, tmp_path):
    short = small_job(small_videos, tmp_path, "trainer.max_steps=3", "trainer.save_every=1")
    assert run_tool("train", *short).code == 0
    assert checkpoint.load(tmp_path / "checkpoints/last.pt")["step"] == 3
    again = run_tool("train", *short)
    assert again.code == 0 and again.out.count("training is complete at step 3 of 3; the run is only tested again\n") == 1, again.out
    more = run_tool("train", *small_job(small_videos, tmp_path))
    assert more.code == 0 and "training is complete" not in more.out
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["split"] == "train"] == [1, 2, 3, 4]
    assert checkpoint.load(tmp_path / "checkpoints/last.pt")["step"] == 4


@pytest.mark.slow
def test_a_run_interrupted_in_the_middle_of_an_epoch_ends_with_the_same_weights(small_videos, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more = ("trainer.batch_size=2", "trainer.save_every=1", "trainer.test=false", "model.sgs.width=0.3", "trainer.statistics_clips=0")
    assert run_tool("train", *small_job(small_videos, whole, *more)).code == 0
    # Nothing later than the checkpoint of step 3 is written: what lies in the folder then is what a resume finds.
    original = checkpoint.save

    def kill_after_step_3(state, path, **more):
        if state["step"] > 3:
            raise KeyboardInterrupt
        original(state, path, **more)

    checkpoint.save = kill_after_step_3
    try:
        with pytest.raises(KeyboardInterrupt):
            run_tool("train", *small_job(small_videos, broken, *more))
    finally:
        checkpoint.save = original
    assert checkpoint.load(broken / "checkpoints/last.pt")["step"] == 3
    assert run_tool("train", *small_job(small_videos, broken, *more)).code == 0
    first, second = (checkpoint.load(folder / "checkpoints/last.pt")["model"] for folder in (whole, broken))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_it(small_videos, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more = ("trainer.save_every=1", "trainer.keep=5", "trainer.test=false")
    assert run_tool("train", *small_job(small_videos, whole, *more)).code == 0
    shutil.copytree(whole, broken)
    last = broken / "checkpoints/last.pt"
    for number in range(2):  # all that were saved after the last step
        path = checkpoint.earlier(last, number)
        assert checkpoint.load(path)["step"] == 4
        path.write_bytes(path.read_bytes()[:-300])
    outcome = run_tool("train", *small_job(small_videos, broken, *more))
    assert outcome.code == 0, outcome.err
    said = outcome.out + outcome.err
    assert f"checkpoint {last} cannot be read" in said and f"resuming from {last.parent}/last-2.pt" in said and "resuming" in said
    first, second = (checkpoint.load(folder / "checkpoints/last.pt")["model"] for folder in (whole, broken))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    steps = [json.loads(line) for line in (broken / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["split"] == "train"] == [1, 2, 3, 4]
    # None of them can be read: an error, and nothing is begun anew over it.
    for path in last.parent.glob("last*.pt"):
        path.write_bytes(b"")
    outcome = run_tool("train", *small_job(small_videos, broken, *more))
    assert outcome.code == 1 and f"checkpoint {last} cannot be read" in outcome.err and f"delete {last} to start anew" in outcome.err


@pytest.mark.slow
@pytest.mark.parametrize("killed_in", ["copyfile", "replace"])
def test_a_kill_while_the_state_before_a_damaged_one_takes_its_place_does_not_begin_anew(small_videos, tmp_path, monkeypatch, killed_in):
    job = small_job(small_videos, tmp_path, "trainer.save_every=1", "trainer.keep=5", "trainer.test=false")
    assert run_tool("train", *job, "trainer.max_steps=2").code == 0
    last = tmp_path / "checkpoints/last.pt"
    last.write_bytes(last.read_bytes()[:-300])

    def kill(source, target):
        if str(target).startswith(str(last)):
            raise KeyboardInterrupt
        return original(source, target)

    module = {"copyfile": shutil, "replace": os}[killed_in]
    original = getattr(module, killed_in)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, killed_in, kill)
        run_tool("train", *job)
    outcome = run_tool("train", *job)
    assert outcome.code == 0 and f"resuming from {last.parent}/last-1.pt" in outcome.out + outcome.err, outcome.err
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["split"] == "train"] == [1, 2, 3, 4]


def test_a_run_whose_lists_changed_does_not_resume(small_videos, tmp_path):
    videos = tmp_path / "videos"
    shutil.copytree(small_videos, videos)
    assert run_tool("train", *small_job(videos, tmp_path / "run", "trainer.max_steps=1", "trainer.test=false")).code == 0
    for name in ("train.csv", "test.csv"):
        (videos / name).write_text((videos / name).read_text().replace(",right", ",zebra"))
    outcome = run_tool("train", *small_job(videos, tmp_path / "run"))
    assert outcome.code == 1 and "the training list or its classes changed since" in outcome.err


@pytest.mark.slow
def test_a_step_limit_below_what_was_trained_still_ends_with_a_test(small_videos, tmp_path):
    more = ("trainer.eval_every=2", "trainer.save_every=1")
    assert run_tool("train", *small_job(small_videos, tmp_path, *more, "trainer.max_steps=3", "trainer.test=false")).code == 0
    (tmp_path / "checkpoints/best.pt").unlink()
    state = checkpoint.load(tmp_path / "checkpoints/last.pt")
    checkpoint.save({**state, "evaluated": 0, "best_top1": -1.0}, tmp_path / "checkpoints/last.pt")
    outcome = run_tool("train", *small_job(small_videos, tmp_path, *more, "trainer.max_steps=1"))
    assert outcome.code == 0 and "top-1" in outcome.out, outcome.err
