"""Sweeps: every job has a run folder and results of its own, and SLURM's need SLURM."""

from __future__ import annotations

import json
import shutil

import pytest
from run_tools import run_tool, small_job


@pytest.mark.slow
def test_a_sweep_of_tests_keeps_the_results_of_every_job(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "it's a run"
    shutil.copytree(trained[0], folder)
    before = (folder / "results.json").read_text()
    outcome = run_tool("test", "-m", f"checkpoint={folder}/checkpoints/best.pt", "dataset.clip.views=1,3")
    assert outcome.code == 0, outcome.err
    views = [json.loads(path.read_text())["protocol"]["views"] for path in folder.glob("runs/sweep/*/results.json")]
    assert sorted(views) == [1, 3] and (folder / "results.json").read_text() == before


@pytest.mark.slow
def test_the_jobs_of_a_sweep_have_run_folders_of_their_own(small_videos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = [o for o in small_job(small_videos, tmp_path) if not o.startswith("trainer.output_dir")]
    outcome = run_tool("train", "-m", *job, "trainer.max_steps=1", "trainer.test=false", "trainer.seed=0,1")
    assert outcome.code == 0, outcome.err
    folders = [path for path in (tmp_path / "runs/sweep").iterdir() if path.is_dir()]
    assert len(folders) == 2 and all((folder / "checkpoints/last.pt").exists() for folder in folders)


def test_a_sweep_of_slurm_jobs_without_slurm_is_refused_in_one_line(monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "/nowhere")
    outcome = run_tool("train", "-m", "hydra/launcher=slurm", "trainer.seed=0,1")
    assert outcome.code == 1 and len(outcome.err.splitlines()) == 1 and "there is no srun on this machine" in outcome.err, outcome.err
