"""A training that is killed at any moment, also while it saves, ends with the very weights of one that was not."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from forked import Job
from run_tools import small_job

from atfr.engine.run import checkpoint

STEPS = 24
MORE = ("trainer.epochs=12", "trainer.save_every=1", "trainer.eval_every=6", "trainer.test=false", "trainer.mixup=0.8", "trainer.accumulate=2", "trainer.ema=0.9")


@pytest.mark.slow
@pytest.mark.parametrize("processes, kills", [(1, 12), (2, 8)])
def test_a_training_killed_again_and_again_ends_with_the_very_weights_of_one_that_was_not(small_videos, tmp_path, processes, kills):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert set(Job("train", *small_job(small_videos, whole, *MORE), processes=processes).wait()) == {0}
    draw, killed = random.Random(processes), 0
    while killed < kills:
        job = Job("train", *small_job(small_videos, broken, *MORE), processes=processes)
        # Spread over the run: so many steps further on, and then any moment of a step, its saving, a validation.
        wait_for_steps(broken, 1 + STEPS * killed // kills, job)
        time.sleep(draw.uniform(0, 0.15))
        job.kill()
        assert set(job.wait()) == {-signal.SIGKILL}
        killed += 1
    assert set(Job("train", *small_job(small_videos, broken, *MORE), processes=processes).wait()) == {0}

    first, second = (checkpoint.load(folder / "checkpoints/last.pt") for folder in (whole, broken))
    assert first["step"] == second["step"] == STEPS
    for part in ("model", "optimizer", "ema"):
        torch.testing.assert_close(first[part], second[part], rtol=0, atol=0, equal_nan=True)
    assert first["best_top1"] == second["best_top1"]
    ours, theirs = (logged(folder) for folder in (whole, broken))
    assert [line["step"] for line in theirs["train"]] == list(range(1, STEPS + 1))
    for split, keys in (("train", ("loss", "grad_norm", "lr")), ("val", ("top1", "bins"))):
        assert [[line[key] for key in ("step", *keys)] for line in ours[split]] == [[line[key] for key in ("step", *keys)] for line in theirs[split]]


def wait_for_steps(folder: Path, steps: int, job: Job) -> None:
    """Until so many steps were logged, or the job is over."""
    deadline = time.monotonic() + 200
    while not job.over() and len(logged(folder)["train"]) < steps:
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
