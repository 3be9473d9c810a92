"""Trainings as jobs of a real SLURM with two nodes: started, stopped, put back into the queue, failed, swept."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from forked import Job
from logged_steps import logged
from run_tools import ROOT, small_job
from slurm_cluster import Cluster, missing_programs

from atfr.engine.run import checkpoint

BATCH = "scripts/slurm/train.sbatch"
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1")
LAUNCHER = ("hydra/launcher=slurm", "hydra.launcher.nodes=2", "hydra.launcher.gpus_per_node=null", "hydra.launcher.tasks_per_node=1", "hydra.launcher.cpus_per_task=1")
PARTS = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests/helpers'}"}  # for launched_parts


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("submitit")
    missing = missing_programs()
    if missing:
        reason = f"not installed: {', '.join(missing)} (Debian: slurm-wlm, munge)"
        assert os.environ.get("REQUIRE_SLURM") != "1", reason
        pytest.skip(reason)
    with Cluster(Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))) as cluster:
        yield cluster


def overrides(videos: Path, folder: Path, *more: str) -> list[str]:
    return small_job(
        videos, folder, "trainer.accelerator=cpu", "trainer.batch_size=2", "trainer.epochs=20", "trainer.eval_every=20", "trainer.test=false", "trainer.workers=0", *more
    )


def slow(starts: int) -> tuple[str, ...]:
    """For a training that is to be stopped so many times."""
    return "optimizer._target_=launched_parts.dawdling_optimizer", f"+optimizer.starts={starts}"


def wait_for_step(folder: Path, step: int) -> None:
    deadline = time.monotonic() + 200
    while len(logged(folder)["train"]) < step:
        assert time.monotonic() < deadline, "the training does not get on"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(small_videos, tmp_path_factory):
    """The weights of the training that the tests below stop."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert set(Job("train", *overrides(small_videos, folder, *slow(0)), processes=2).wait()) == {0}
    return checkpoint.load(folder / "checkpoints/last.pt")["model"]


QUIET = pytest.mark.skipif(not os.environ.get("ATFR_QUIET_MACHINE"), reason="jobs must be through their imports in ten seconds; ATFR_QUIET_MACHINE=1 runs it")


@pytest.mark.parametrize("how, stops", [("preempted", 1), pytest.param("told and later preempted", 2, marks=pytest.mark.slow), pytest.param("time limit", 1, marks=QUIET)])
def test_jobs_on_two_nodes_that_have_to_stop_are_queued_again_and_end_with_the_same_weights(cluster, small_videos, tmp_path, undisturbed, how, stops):
    """One through sbatch and one through submitit, at the same time."""
    # SLURM looks every half a minute at what time is left.
    limits = {"time limit": (["--time=1", "--signal=USR1@50"], ["hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=50"])}.get(how, ([], []))
    batch, swept, output, name = tmp_path / "batch", tmp_path / "swept", tmp_path / "output.txt", how.replace(" ", "-")
    job = cluster.submit("--partition=low", *TWO_NODES, *limits[0], "--export=ALL,PYTHONPATH=" + PARTS["PYTHONPATH"], f"--output={output}", BATCH, *overrides(small_videos, batch, *slow(stops)))
    launcher = [*LAUNCHER, *limits[1], "hydra.launcher.partition=low", f"hydra.launcher.name={name}", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    command = [sys.executable, str(ROOT / "tools/train.py"), "-m", *overrides(small_videos, swept, *slow(stops)), *launcher]
    with open(tmp_path / "sweep.txt", "w") as said, subprocess.Popen(command, cwd=tmp_path, env={**cluster.environment, **PARTS}, stdout=said, stderr=said) as sweep, ExitStack() as at_the_end:
        at_the_end.callback(sweep.kill)
        for folder in (batch, swept):
            wait_for_step(folder, 2 if how != "time limit" else 0)
        jobs = [job, cluster.numbered(name)]
        if how.startswith("told"):
            cluster.ask("scancel", "--signal=USR1", *jobs)
        if how != "preempted":
            for one in cluster.restarted(jobs):
                cluster.ask("scontrol", "update", f"JobId={one}", "TimeLimit=60")  # the next look is not to stop it as well
        if how.endswith("preempted"):
            for folder in (batch, swept):
                wait_for_step(folder, len(logged(folder)["train"]) + 1)
            urgent = cluster.submit("--partition=high", "--nodes=2", "--exclusive", f"--output={tmp_path / 'urgent.txt'}", "--wrap=sleep 1")
            assert cluster.wait(urgent) == "COMPLETED"
        assert [cluster.wait(one) for one in jobs] == ["COMPLETED", "COMPLETED"]
        assert sweep.wait(timeout=100) == 0, (tmp_path / "sweep.txt").read_text()
    texts = [output.read_text(), "".join(path.read_text() for path in tmp_path.glob("sweep/.submitit/*/*_0_log.err"))]
    for one, folder, text in zip(jobs, (batch, swept), texts, strict=True):
        restarts = int(cluster.facts(one)["Restarts"])
        assert restarts == stops or (how == "time limit" and restarts > stops)  # on a busy machine that look may have come first
        assert text.count("the job is requeued") == restarts and "Traceback" not in text, text
        # Wherever it stopped, no step was lost or done twice.
        assert [line["step"] for line in logged(folder)["train"]] == list(range(1, 81))
        torch.testing.assert_close(checkpoint.load(folder / "checkpoints/last.pt")["model"], undisturbed, rtol=0, atol=0)


@pytest.mark.slow
def test_jobs_that_fail_say_why_and_so_does_the_sweep_of_one_that_does(cluster, small_videos, tmp_path):
    output = tmp_path / "output.txt"
    broken = overrides(small_videos, tmp_path / "job", "optimizer._target_=launched_parts.failing_optimizer", "+optimizer.kind=mistake")
    job = cluster.submit(*TWO_NODES, "--export=ALL,PYTHONPATH=" + PARTS["PYTHONPATH"], f"--output={output}", BATCH, *broken)
    own = [one for one in overrides(small_videos, tmp_path / "unused") if not one.startswith("trainer.output_dir=")]
    sweep = [*own, *LAUNCHER, f"hydra.sweep.dir={tmp_path / 'sweep'}", "trainer.max_steps=2", "trainer.statistics_clips=0"]
    command = [sys.executable, str(ROOT / "tools/train.py"), "-m", *sweep, "trainer.seed=0,-1"]
    done = subprocess.run(command, cwd=tmp_path, env=cluster.environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0, done.stdout
    assert len(list(tmp_path.glob("runs/sweep/*/checkpoints/last.pt"))) == 1
    errors = [path.read_text() for path in tmp_path.glob("sweep/.submitit/*/*.err")]
    assert sum("error: trainer.seed" in text for text in errors) >= 1, errors

    assert cluster.wait(job, seconds=60) == "FAILED"
    assert output.read_text().count("error: rank 1 was told nonsense") == 1
    assert cluster.facts(job)["Restarts"] == "0"
