"""The trainer warns once if too much time is spent waiting for data."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch
import training
from run_tools import run_script

from atfr.engine import data_wait
from atfr.engine.data_wait import DataWait
from atfr.models.backbones.x3d import x3d

SETTINGS = replace(training.SETTINGS, batch_size=2, workers=3)


def test_it_warns_once_if_more_than_a_fifth_of_at_least_twenty_steps_was_waiting(caplog):
    wait, quick = DataWait(), DataWait()
    for step in range(1, 40):
        wait.add(waited=0.25, total=1.0)
        quick.add(waited=0.19, total=1.0)
        wait.warn(SETTINGS)
        quick.warn(SETTINGS)
        assert len(caplog.messages) == int(step >= 20)
    assert caplog.messages[0].startswith("25% of the training time is spent waiting for data: set trainer.workers higher (3 per rank now")


def test_the_fraction_is_that_of_the_whole_run(caplog):
    wait = DataWait()
    for _ in range(30):
        wait.add(waited=0.0, total=1.0)
    for step in range(20):  # 30 quick seconds: (step + 1) / (31 + step) passes a fifth with the eighth
        wait.add(waited=1.0, total=1.0)
        wait.warn(SETTINGS)
        assert len(caplog.messages) == int(step >= 7)


@pytest.mark.parametrize("slow", [True, False])
def test_a_training_warns_of_a_slow_loader_and_not_of_a_fast_one(tmp_path, monkeypatch, caplog, slow):
    monkeypatch.setattr(data_wait, "LEAST_STEPS", 2)

    def batches(epoch, start):
        for step in range(start, 5):
            if slow:
                time.sleep(0.3)
            yield training.Batch(torch.randn(2, 3, 4, 32, 32), torch.tensor([0, 1]), ("a", "b"))

    model = x3d(size="tiny", num_classes=2, dropout=0.0, sgs=None)
    training.trainer_of(model, tmp_path, lr=0.01, batches=batches, steps_per_epoch=5, settings=SETTINGS).run()
    assert sum("waiting for data" in message for message in caplog.messages) == int(slow)


def test_the_benchmark_computes_the_waiting_time_from_a_log(tmp_path):
    """By hand: 4 steps at 1 s and 3 s, 2 at 0.5 s and 1 s; the first line, with the start of the workers, does not count."""
    values = [(1, 50.0, 1.0), (5, 1.0, 3.0), (7, 0.5, 1.0)]
    lines = [{"step": step, "split": "train", "data_s": data, "step_s": rest} for step, data, rest in values]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 7, "split": "val", "top1": 1.0}]))
    outcome = run_script("benchmarks/data_wait.py", "--run", str(tmp_path))
    assert outcome.code == 0 and "6 steps: 833.33 ms for data and 2333.3 ms for the rest of a step; waiting is 26.32% of the time" in outcome.out
