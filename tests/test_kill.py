"""A training that is killed at any moment, also while it saves, ends with the very weights of one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from run_tools import ROOT, small_job

from atfr.engine import checkpoint

KILLS = int(os.environ.get("ATFR_KILLS", 3))  # of one process; ATFR_KILLS=20 for an evening
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
MORE = ("trainer.batch_size=4", "trainer.epochs=12", "trainer.save_every=1", "trainer.eval_every=6", "trainer.test=false", "trainer.mixup=0.8", "trainer.accumulate=2", "trainer.ema=0.9")


@pytest.mark.slow
@pytest.mark.parametrize("processes,kills", [(1, KILLS), (2, max(KILLS // 4, 1))])
def test_a_killed_training_ends_with_the_very_weights_of_one_that_was_not(small_videos, tmp_path, processes, kills):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(processes, small_job(small_videos, whole, *MORE)).wait(timeout=300) == 0
    training = small_job(small_videos, broken, *MORE)
    draw = random.Random(processes)
    for number in range(kills):
        job = start(processes, training)
        # Spread over the run: so many steps further on, and then any moment of a step and its saving.
        wait_for_steps(broken, 1 + 20 * number // kills, job)
        time.sleep(draw.uniform(0, 0.2))
        for pid in family(job.pid):
            os.kill(pid, signal.SIGKILL)
        assert job.wait(timeout=60) == -signal.SIGKILL
    assert start(processes, training).wait(timeout=300) == 0

    first, second = (checkpoint.load(folder / "checkpoints/last.pt") for folder in (whole, broken))
    assert first["step"] == second["step"] == 24
    for part in ("model", "optimizer", "ema"):
        torch.testing.assert_close(first[part], second[part], rtol=0, atol=0, equal_nan=True)
    assert first["best_top1"] == second["best_top1"]
    ours, theirs = (logged(folder) for folder in (whole, broken))
    assert [line["step"] for line in theirs["train"]] == list(range(1, 25))
    for split, keys in (("train", ("loss", "grad_norm", "lr")), ("val", ("top1", "bins"))):
        assert [[line[key] for key in ("step", *keys)] for line in ours[split]] == [[line[key] for key in ("step", *keys)] for line in theirs[split]]


def start(processes: int, overrides: list[str]) -> subprocess.Popen:
    """`tools/train.py`, in the background."""
    launcher = TORCHRUN if processes > 1 else []
    command = [sys.executable, *launcher, str(ROOT / "tools/train.py"), *overrides]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})


def family(pid: int) -> list[int]:
    """A process and its descendants, wherever their sessions are: torchrun gives each worker one of its own."""
    children = (Path(f"/proc/{pid}/task/{task}/children").read_text().split() for task in os.listdir(f"/proc/{pid}/task"))
    return [pid, *(member for child in children for number in child for member in family(int(number)))]


def wait_for_steps(folder: Path, steps: int, job: subprocess.Popen) -> None:
    """Until so many steps were logged, or the job is over."""
    deadline = time.monotonic() + 200
    while job.poll() is None and len(logged(folder)["train"]) < steps:
        assert time.monotonic() < deadline, "the training does not get on"
        time.sleep(0.01)


def logged(folder: Path) -> dict[str, list[dict]]:
    """The whole lines of metrics.jsonl, by split."""
    found: dict[str, list[dict]] = {"train": [], "val": []}
    if (folder / "metrics.jsonl").exists():
        for line in (folder / "metrics.jsonl").read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                entry = json.loads(line)
                found[entry["split"]].append(entry)
    return found
