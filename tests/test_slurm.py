"""Trainings as jobs of a real SLURM with two nodes: started, stopped, put back into the queue, failed, swept."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from run_tools import ROOT, small_job
from slurm_cluster import Cluster, missing_programs
from test_kill import logged

from atfr.engine import checkpoint

pytestmark = pytest.mark.slow
BATCH = "scripts/slurm/train.sbatch"
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1")


@pytest.fixture(scope="module")
def cluster():
    missing = missing_programs()
    if missing:
        reason = f"not installed: {', '.join(missing)} (Debian: slurm-wlm, munge)"
        assert os.environ.get("REQUIRE_SLURM") != "1", reason
        pytest.skip(reason)
    with Cluster(Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))) as cluster:
        yield cluster


def overrides(videos: Path, folder: Path, *more: str) -> list[str]:
    return small_job(
        videos, folder, "trainer.accelerator=cpu", "trainer.batch_size=2", "trainer.epochs=40", "trainer.eval_every=40", "trainer.test=false", "trainer.workers=0", *more
    )


def wait_for_step(folder: Path, step: int) -> None:
    deadline = time.monotonic() + 100
    while len(logged(folder)["train"]) < step:
        assert time.monotonic() < deadline, "the training does not get on"
        time.sleep(0.05)


@pytest.mark.parametrize("how", ["told", "preempted"])
def test_a_job_on_two_nodes_that_has_to_stop_is_queued_again_and_ends_with_the_same_weights(cluster, small_videos, tmp_path, how):
    folder, output = tmp_path / "job", tmp_path / "output.txt"
    job = cluster.submit("--partition=low", *TWO_NODES, f"--output={output}", BATCH, *overrides(small_videos, folder))
    wait_for_step(folder, 5)
    if how == "told":
        cluster.ask("scancel", "--signal=USR1", job)  # as before the end of its time
    else:
        urgent = cluster.submit("--partition=high", "--nodes=2", "--exclusive", f"--output={tmp_path / 'urgent.txt'}", "--wrap=sleep 1")
        assert cluster.wait(urgent) == "COMPLETED"
    assert cluster.wait(job) == "COMPLETED"
    text = output.read_text()
    assert cluster.facts(job)["Restarts"] == "1"
    assert text.count("put back into the queue") == 1 and "saved in" in text and "Traceback" not in text, text
    # Wherever it stopped, no step was lost or done twice.
    assert [line["step"] for line in logged(folder)["train"]] == list(range(1, 161))
    assert sorted(path.name for path in tmp_path.glob("job*")) == ["job"]

    alone = tmp_path / "alone"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "tools/train.py"), *overrides(small_videos, alone)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=200)
    ours, theirs = (checkpoint.load(one / "checkpoints/last.pt")["model"] for one in (folder, alone))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_process_that_fails_ends_the_job_as_failed_with_its_error(cluster, small_videos, tmp_path):
    output = tmp_path / "output.txt"
    broken = overrides(small_videos, tmp_path / "job", "optimizer._target_=launched_parts.failing_optimizer", "+optimizer.kind=mistake")
    job = cluster.submit(*TWO_NODES, f"--export=ALL,PYTHONPATH={ROOT / 'tests'}", f"--output={output}", BATCH, *broken)
    assert cluster.wait(job, seconds=60) == "FAILED"
    assert output.read_text().count("error: rank 1 was told nonsense") == 1
    assert cluster.facts(job)["Restarts"] == "0"


def test_a_sweep_runs_its_jobs_on_the_nodes_and_fails_if_one_of_them_does(cluster, small_videos, tmp_path):
    launcher = ("hydra/launcher=slurm", "hydra.launcher.nodes=2", "hydra.launcher.gpus_per_node=null", "hydra.launcher.tasks_per_node=1", "hydra.launcher.cpus_per_task=1")
    own = [one for one in overrides(small_videos, tmp_path / "unused") if not one.startswith("trainer.output_dir=")]
    job = [*own, *launcher, f"hydra.sweep.dir={tmp_path / 'sweep'}", "trainer.epochs=2", "trainer.eval_every=2"]
    command = [sys.executable, str(ROOT / "tools/train.py"), "-m", *job, "trainer.seed=0,1,-1"]
    done = subprocess.run(command, cwd=tmp_path, env=cluster.environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0, done.stdout
    assert len(list(tmp_path.glob("runs/sweep/*/checkpoints/last.pt"))) == 2
    errors = [path.read_text() for path in tmp_path.glob("sweep/.submitit/*/*.err")]
    assert sum("error: trainer.seed" in text for text in errors) >= 1, errors
