"""Trainings that start from weights: of a file, or of another run."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf
from run_tools import run_tool, small_job
from source_networks import (
    source_x3d,
)

from atfr.cli.builders import weights_given
from atfr.engine.run import checkpoint


@pytest.mark.slow
def test_a_training_starts_from_the_weights_once_and_a_test_never_reads_them(small_videos, tmp_path):
    weights = tmp_path / "zoo.pyth"
    torch.save({"model_state": source_x3d(classes=400).state_dict()}, weights)
    key = f"++model.weights={weights}"
    job = small_job(small_videos, tmp_path / "run", "model=x3d", "optimizer.lr=0.0", "trainer.max_steps=1", "trainer.statistics_clips=0", "trainer.test=false", key)
    outcome = run_tool("train", *job)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("weights from ") == 1 and "head of 400 classes replaced by one of 2" in outcome.out
    trained = checkpoint.load(tmp_path / "run/checkpoints/last.pt")["model"]
    name = "blocks.3.res_blocks.1.branch2.conv_b.weight"
    assert torch.equal(trained[f"{name}"], torch.load(weights)["model_state"][name])
    weights.unlink()
    outcome = run_tool("train", *job)
    assert outcome.code == 0 and "weights from " not in outcome.out, outcome.err
    outcome = run_tool("test", f"checkpoint={tmp_path}/run/checkpoints/best.pt")
    assert outcome.code == 0 and "weights from " not in outcome.out, outcome.err
    outcome = run_tool("test", f"checkpoint={tmp_path}/run/checkpoints/best.pt", key)
    assert outcome.code == 1 and "tools/test.py does not take" in outcome.err and "the weights are those of checkpoint=" in outcome.err


@pytest.mark.slow
def test_a_training_starts_from_the_averaged_weights_of_another_run_with_its_own_schedule_and_then_goes_on_from_itself(small_videos, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    options = ("model=x3d", "trainer.epochs=1", "trainer.test=false", "trainer.statistics_clips=0")
    outcome = run_tool("train", *small_job(small_videos, first, *options, "trainer.ema=0.9"))
    assert outcome.code == 0, outcome.err
    source = checkpoint.load(first / "checkpoints/last.pt")
    averages = source["ema"]["averages"]
    assert source["step"] == 2 and any(not torch.equal(value, source["model"][name]) for name, value in averages.items())

    start = [*options, "optimizer.lr=0.0", f"init_from={first}/checkpoints/last.pt"]
    outcome = run_tool("train", *small_job(small_videos, second, *start, "trainer.max_steps=1"))
    assert outcome.code == 0 and outcome.out.count("weights from ") == 1 and "averaged weights" in outcome.out, outcome.err
    begun = checkpoint.load(second / "checkpoints/last.pt")
    assert begun["step"] == 1 and "ema" not in begun
    for name, value in averages.items():
        assert torch.equal(begun["model"][name], value), name

    outcome = run_tool("train", *small_job(small_videos, second, *start))
    assert outcome.code == 0 and "weights from " not in outcome.out, outcome.err
    assert f"init_from is ignored: this run resumes from {second}/checkpoints/last.pt" in outcome.out and "resuming" in outcome.out

    refused = small_job(small_videos, tmp_path / "third", *start[:-1], f"init_from={first}", "++model.weights=other.pth")
    outcome = run_tool("train", *refused)
    assert outcome.code == 1 and f"error: model.weights=other.pth and init_from={first} both say what to start from" in outcome.err
    outcome = run_tool("test", f"checkpoint={first}/checkpoints/best.pt", f"init_from={second}")
    assert outcome.code == 1 and "tools/test.py does not take init_from" in outcome.err


def test_of_a_run_folder_the_best_checkpoint_is_read(small_videos, tmp_path):
    outcome = run_tool("train", *small_job(small_videos, tmp_path / "run", "model=x3d", f"init_from={tmp_path}"))
    assert outcome.code == 1 and outcome.err.strip().splitlines()[-1].startswith(f"error: init_from={tmp_path} is a folder without checkpoints/best.pt")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/best.pt").touch()
    config = OmegaConf.create({"model": {}, "init_from": str(tmp_path)})
    assert weights_given(config)[:2] == ("init_from", tmp_path / "checkpoints/best.pt")


def test_a_file_that_is_not_there_ends_a_training_in_one_line(small_videos, tmp_path):
    outcome = run_tool("train", *small_job(small_videos, tmp_path / "run", "++model.weights=nowhere.pyth"))
    assert outcome.code == 1 and outcome.err.strip().splitlines()[-1].startswith("error: model.weights=nowhere.pyth does not exist")
    assert not (tmp_path / "run").exists()
