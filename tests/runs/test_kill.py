"""A training that is killed at any moment, also while it saves, ends with the same weights as an uninterrupted one."""

from __future__ import annotations

import random
import signal
import time

import pytest
import torch
from forked import Job
from logged_steps import logged, wait_for_steps
from run_tools import small_job

from atfr.engine.run import checkpoint

MORE = ("trainer.save_every=1", "trainer.eval_every=6", "trainer.test=false", "trainer.mixup=0.8", "trainer.accumulate=2", "trainer.ema=0.9")


@pytest.mark.parametrize("processes, kills, steps", [(1, 2, 8), pytest.param(1, 12, 24, marks=pytest.mark.slow), pytest.param(2, 8, 24, marks=pytest.mark.slow)])
def test_a_training_that_is_killed_repeatedly_ends_with_exactly_the_same_weights(small_videos, tmp_path, processes, kills, steps):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more = (*MORE, f"trainer.epochs={steps // 2}")
    assert set(Job("train", *small_job(small_videos, whole, *more), processes=processes).wait()) == {0}
    draw, killed = random.Random(processes), 0
    while killed < kills:
        job = Job("train", *small_job(small_videos, broken, *more), processes=processes)
        # Kills are spread over the run, and hit any moment of a step, a save or a validation.
        wait_for_steps(broken, 1 + steps * killed // kills, job)
        time.sleep(draw.uniform(0, 0.15))
        job.kill()
        assert set(job.wait()) == {-signal.SIGKILL}
        killed += 1
    assert set(Job("train", *small_job(small_videos, broken, *more), processes=processes).wait()) == {0}

    first, second = (checkpoint.load(folder / "checkpoints/last.pt") for folder in (whole, broken))
    assert first["step"] == second["step"] == steps
    for part in ("model", "optimizer", "ema"):
        torch.testing.assert_close(first[part], second[part], rtol=0, atol=0, equal_nan=True)
    assert first["best_top1"] == second["best_top1"]
    ours, theirs = (logged(folder) for folder in (whole, broken))
    assert [line["step"] for line in theirs["train"]] == list(range(1, steps + 1))
    for split, keys in (("train", ("loss", "grad_norm", "lr")), ("val", ("top1", "bins"))):
        assert [[line[key] for key in ("step", *keys)] for line in ours[split]] == [[line[key] for key in ("step", *keys)] for line in theirs[split]]
