"""The programs of tools/ on a GPU: training, going on, testing on the other device, launchers, exporting."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from devices import on_gpu, seeing
from forked import Job
from predictions import rows
from run_tools import run_tool, small_job, torchrun

from atfr.engine.run import checkpoint

pytestmark = pytest.mark.gpu
EXACT = ("trainer.precision=fp32", "model.dropout=0.0")


def run(name: str, *arguments: str, folder: Path, gpus: int = 1) -> str:
    """A program in a process that sees so many GPUs; what it prints."""
    output = folder / f"{name}.txt"
    codes = Job(name, *arguments, output=output, **seeing(gpus)).wait()
    assert codes == [0], output.read_text()
    return output.read_text()


def logged(folder: Path, key: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if line["split"] == "train"]


@pytest.fixture(scope="module")
def trained(small_videos, tmp_path_factory) -> Path:
    """The run folder of a training on a GPU as it is by default."""
    folder = tmp_path_factory.mktemp("trained on a GPU")
    said = run("train", *small_job(small_videos, folder, "trainer.workers=1"), folder=folder)
    assert "on cuda:0" in said
    return folder


def test_training_leaves_the_results_of_all_steps_and_says_in_which_precision(trained):
    losses = logged(trained)
    assert len(losses) == 4 and all(math.isfinite(loss) for loss in losses)
    results = json.loads((trained / "results.json").read_text())
    assert results["num_videos"] == 4 and results["num_views"] == 8 and results["failed"] == [] and results["clips_per_second"] > 0
    assert results["protocol"]["precision"] in ("bfloat16", "float32") and results["protocol"]["tf32"] is False
    assert len(rows(trained)) == 8


def test_a_checkpoint_holds_nothing_that_needs_a_gpu_and_is_exported(trained, tmp_path):
    best = trained / "checkpoints/best.pt"
    code = "import sys, torch; torch.load(sys.argv[1], map_location='cpu', weights_only=True); assert not torch.cuda.is_available()"
    subprocess.run([sys.executable, "-c", code, str(best)], check=True)
    run("export", f"checkpoint={best}", f"trainer.output_dir={tmp_path}", folder=tmp_path)
    assert (tmp_path / "export/model.pt2").is_file()


@pytest.mark.parametrize("trained_on", [0, 1], ids=["CPU", "GPU"])
def test_a_checkpoint_of_one_device_gives_its_predictions_on_the_other(small_videos, tmp_path, trained_on):
    run("train", *small_job(small_videos, tmp_path / "run", "trainer.precision=fp32"), folder=tmp_path, gpus=trained_on)
    best = f"checkpoint={tmp_path}/run/checkpoints/best.pt"
    folders = [tmp_path / str(gpus) for gpus in (0, 1)]
    for gpus, folder in enumerate(folders):
        folder.mkdir()
        run("test", best, f"trainer.output_dir={folder}", folder=folder, gpus=gpus)
    for row, other in zip(rows(folders[0]), rows(folders[1]), strict=True):
        assert {**row, "score": ""} == {**other, "score": ""}
        assert float(row["score"]) == pytest.approx(float(other["score"]), abs=1e-3)


def test_predictions_in_float32_are_the_same_at_any_batch_size(trained, tmp_path):
    found = []
    for batch_size in (1, 8):
        folder = tmp_path / str(batch_size)
        folder.mkdir()
        best = f"checkpoint={trained}/checkpoints/best.pt"
        run("test", best, "trainer.precision=fp32", f"trainer.batch_size={batch_size}", f"trainer.output_dir={folder}", folder=folder)
        found.append(rows(folder))
    for row, other in zip(*found, strict=True):
        assert {**row, "score": ""} == {**other, "score": ""}
        assert float(row["score"]) == pytest.approx(float(other["score"]), abs=2e-4)


def train(*arguments: str, until: int | None = None) -> None:
    """Train in this process; with `until`, be interrupted before anything later than that step is saved."""
    save = checkpoint.save

    def save_until(state: dict, path: Path, **more: object) -> None:
        if until is not None and state["step"] > until:
            raise KeyboardInterrupt
        save(state, path, **more)

    checkpoint.save = save_until
    try:
        outcome = run_tool("train", *arguments)
    except KeyboardInterrupt:
        return
    assert until is None and outcome.code == 0, outcome.out + outcome.err


NETWORKS = {
    "x3d": ("model=x3d_sgs",),
    "x3d in float32": ("model=x3d_sgs", "trainer.precision=fp32", "trainer.ema=0.9", "trainer.accumulate=2"),
    "x3d, reference": ("model=x3d_sgs", "model/sgs=reference", "trainer.checkpoint_activations=true"),
    "resnet3d": ("model=resnet3d_sgs",),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_a_deterministic_run_that_is_interrupted_ends_with_the_very_weights_of_one_that_was_not(small_videos, tmp_path, network):
    folders = [tmp_path / "whole", tmp_path / "broken"]
    more = (*NETWORKS[network], "trainer.batch_size=2", "trainer.save_every=1", "trainer.test=false", "trainer.deterministic=true", "trainer.mixup=0.8")
    whole, broken = (small_job(small_videos, folder, *more) for folder in folders)
    on_gpu(train, *whole, output=tmp_path / "whole.txt")
    on_gpu(train_until_3, *broken, output=tmp_path / "broken.txt")
    assert checkpoint.load(folders[1] / "checkpoints/last.pt")["step"] == 3
    on_gpu(train, *broken, output=tmp_path / "again.txt")
    first, second = (checkpoint.load(folder / "checkpoints/last.pt") for folder in folders)
    assert first["step"] == second["step"] == 8
    for part in ("model", "optimizer", *(["ema"] if "ema" in first else [])):
        torch.testing.assert_close(first[part], second[part], rtol=0, atol=0, equal_nan=True)
    assert logged(folders[0]) == logged(folders[1])


def train_until_3(*arguments: str) -> None:
    train(*arguments, until=3)


def test_float16_trains_with_a_scaled_loss_and_goes_on(small_videos, tmp_path):
    job = small_job(small_videos, tmp_path, "trainer.precision=fp16", "trainer.test=false")
    run("train", *job, "trainer.max_steps=2", folder=tmp_path)
    assert checkpoint.load(tmp_path / "checkpoints/last.pt")["scaler"]["scale"] > 1
    run("train", *job, folder=tmp_path)
    state = checkpoint.load(tmp_path / "checkpoints/last.pt")
    assert state["step"] == 4 and all(math.isfinite(loss) for loss in logged(tmp_path))


@pytest.mark.parametrize("more", [[], ["trainer.sync_batch_norm=true"]], ids=["plain", "batch norm over processes"])
def test_one_process_of_torchrun_trains_as_one_without_a_launcher(small_videos, tmp_path, more):
    alone, launched = (small_job(small_videos, tmp_path / name, *EXACT, *more, "trainer.test=false") for name in ("alone", "launched"))
    run("train", *alone, folder=tmp_path)
    outcome = torchrun(1, "train", *launched, **seeing())
    assert outcome.code == 0, outcome.err
    assert "on cuda:0" in outcome.out
    assert logged(tmp_path / "launched") == pytest.approx(logged(tmp_path / "alone"), rel=1e-3)


def test_one_process_of_torchrun_tests(trained, tmp_path):
    outcome = torchrun(1, "test", f"checkpoint={trained}/checkpoints/best.pt", f"trainer.output_dir={tmp_path}", **seeing())
    assert outcome.code == 0, outcome.err
    assert len(rows(tmp_path)) == 8


def test_an_error_under_torchrun_is_said_in_a_line_with_exit_code_1(small_videos, tmp_path):
    outcome = torchrun(1, "train", *small_job(small_videos, tmp_path, "dataset.clip.frames=1", "model=i3d", "model.size=R50"), **seeing())
    assert outcome.code == 1 and any(line.startswith("error: ") for line in outcome.err.splitlines()), outcome.err


@pytest.mark.gpu(2)
def test_two_gpus_train_and_test_as_one_does(small_videos, tmp_path):
    """Batch norm over both, each of which has half of the clips; started by the program itself, which finds two GPUs."""
    more = (*EXACT, "trainer.sync_batch_norm=true")
    for gpus in (1, 2):
        said = run("train", *small_job(small_videos, tmp_path / str(gpus), *more), folder=tmp_path, gpus=gpus)
        assert said.count("8 training, 4 validation") == 1
    assert logged(tmp_path / "2") == pytest.approx(logged(tmp_path / "1"), rel=1e-2)
    assert [row["video"] for row in rows(tmp_path / "1")] == [row["video"] for row in rows(tmp_path / "2")]


@pytest.mark.gpu(2)
def test_two_processes_cannot_share_a_gpu(small_videos, tmp_path):
    outcome = torchrun(2, "train", *small_job(small_videos, tmp_path), **seeing(1))
    assert outcome.code == 1 and "local rank 1 has no GPU, torch sees 1" in outcome.err, outcome.err
