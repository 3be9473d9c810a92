"""Testing a checkpoint: the same predictions again, what may be changed, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from predictions import rows
from run_tools import run_tool

from atfr.engine.run import checkpoint


@pytest.mark.parametrize("batch_size", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_testing_again_gives_the_same_predictions_at_any_batch_size(trained, tmp_path, batch_size):
    folder, _ = trained
    outcome = run_tool("test", f"checkpoint={folder}/checkpoints/best.pt", f"trainer.batch_size={batch_size}", f"trainer.output_dir={tmp_path}")
    assert outcome.code == 0, outcome.err
    for row, other in zip(rows(folder), rows(tmp_path), strict=True):
        assert {**row, "score": ""} == {**other, "score": ""}
        assert float(row["score"]) == pytest.approx(float(other["score"]), abs=2e-4)


def test_overrides_of_a_test_change_the_checkpoints_own_config(trained, tmp_path):
    folder, _ = trained
    best = f"checkpoint={folder}/checkpoints/best.pt"
    outcome = run_tool("test", best, "dataset.clip.views=3", "model.sgs.num_bins=2", f"trainer.output_dir={tmp_path}")
    assert outcome.code == 0, outcome.err
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["num_views"] == 12 and results["bins"]["max"] <= 2
    assert results["protocol"]["frames"] == 8  # of the checkpoint, not of this command


def test_a_checkpoint_of_another_model_or_dataset_is_refused(trained, tmp_path):
    best = f"checkpoint={trained[0]}/checkpoints/best.pt"
    outcome = run_tool("test", best, "model.size=XS", f"trainer.output_dir={tmp_path}")
    assert outcome.code == 1 and "is of another model" in outcome.err
    outcome = run_tool("test", best, "model=x3d", f"trainer.output_dir={tmp_path}")
    assert outcome.code == 1 and "is of another model" in outcome.err
    outcome = run_tool("test", best, "dataset.class_names=[left,up]", f"trainer.output_dir={tmp_path}")
    assert outcome.code == 1 and "error: " in outcome.err
    outcome = run_tool("test", "checkpoint=nowhere.pt")
    assert outcome.code == 1 and "checkpoint nowhere.pt does not exist" in outcome.err


@pytest.mark.parametrize("tool", ["test", "export", "predict"])
def test_a_command_without_a_checkpoint_is_told_to_add_one(tool):
    outcome = run_tool(tool)
    assert outcome.code == 1 and outcome.err == "error: checkpoint is not set; add checkpoint=... to the command\n", outcome.err


@pytest.mark.slow
def test_a_checkpoint_is_found_in_a_folder_with_any_name(trained, tmp_path):
    folder = tmp_path / "model=x3d_sgs,trainer.seed=1"
    shutil.copytree(trained[0], folder)
    outcome = run_tool("test", f"checkpoint={folder}/checkpoints/best.pt")
    assert outcome.code == 0, outcome.err
    stray = tmp_path / "best.pt"
    shutil.copy(folder / "checkpoints/best.pt", stray)
    outcome = run_tool("test", f"checkpoint={stray}")
    assert outcome.code == 1 and "add trainer.output_dir=... for the results" in outcome.err


OTHER_BUDGET = "use python tools/calibrate.py checkpoint=RUN budgets=[...]"


@pytest.mark.parametrize(
    "argument,way_out",
    [
        ("experiment=ut_interaction", "change the checkpoint's config key by key"),
        pytest.param("~model.sgs", "change the checkpoint's config key by key", marks=pytest.mark.slow),
        ("model.sgs.gflops=0.4", OTHER_BUDGET),
        *(pytest.param(budget, OTHER_BUDGET, marks=pytest.mark.slow) for budget in ("model.sgs.keep_ratio=0.4", "model.sgs.gflops_range=[0.3,1]")),
    ],
)
def test_what_a_test_cannot_override_is_refused(trained, argument, way_out):
    outcome = run_tool("test", f"checkpoint={trained[0]}/checkpoints/best.pt", argument)
    assert outcome.code == 1 and f"tools/test.py does not take {argument}: " in outcome.err and way_out in outcome.err, outcome.err


def test_testing_needs_no_training_videos(trained, small_videos, tmp_path):
    videos = tmp_path / "videos"
    shutil.copytree(small_videos, videos)
    (videos / "train.csv").unlink()
    best = f"checkpoint={trained[0]}/checkpoints/best.pt"
    outcome = run_tool("test", best, f"dataset.root={videos}", f"trainer.output_dir={tmp_path / 'out'}")
    assert outcome.code == 0, outcome.err
    assert [row["prediction"] for row in rows(tmp_path / "out")] == [row["prediction"] for row in rows(trained[0])]


def test_spoilt_weights_give_an_error_and_no_accuracy(trained, tmp_path):
    state = checkpoint.load(trained[0] / "checkpoints/best.pt")
    state["model"]["blocks.5.proj.bias"][0] = torch.nan
    checkpoint.save(state, tmp_path / "checkpoints/best.pt")
    outcome = run_tool("test", f"checkpoint={tmp_path}/checkpoints/best.pt")
    assert outcome.code == 1 and ".mp4 are NaN or infinite" in outcome.err
    assert not (tmp_path / "results.json").exists()
