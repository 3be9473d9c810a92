"""The trainer warns once if too much time is spent waiting for data."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import torch
from run_tools import run_script

from atfr.engine import data_wait
from atfr.engine.data_wait import DataWait
from atfr.engine.distributed.comm import DistInfo
from atfr.engine.optim import sgd
from atfr.engine.settings import TrainerSettings
from atfr.engine.trainer import Trainer
from atfr.models.backbones.x3d import x3d

SETTINGS = TrainerSettings(
    output_dir=None, batch_size=2, epochs=1, max_steps=None, seed=0, accelerator="cpu", devices=None, precision="fp32", workers=3,
    timeout_s=0, label_smoothing=0.0, clip_norm=None, statistics_clips=0, eval_every=1, save_every=0, log_every=1, resume=False, test=False,
)  # fmt: skip


def test_it_warns_once_if_more_than_a_fifth_of_at_least_twenty_steps_was_waiting():
    wait, quick = DataWait(), DataWait()
    for step in range(1, 40):
        wait.add(waited=0.25, total=1.0)
        quick.add(waited=0.19, total=1.0)
        warning = wait.warning(SETTINGS)
        assert (warning is not None) == (step == 20) and quick.warning(SETTINGS) is None
        if warning:
            assert warning.startswith("25% of the training time is spent waiting for data: set trainer.workers higher (3 per rank now")


def test_the_fraction_is_that_of_the_whole_run():
    wait = DataWait()
    for _ in range(30):
        wait.add(waited=0.0, total=1.0)
    warned = []
    for step in range(20):  # 30 quick seconds: (step + 1) / (31 + step) passes a fifth with the eighth
        wait.add(waited=1.0, total=1.0)
        warned.append(wait.warning(SETTINGS) is not None)
    assert warned.index(True) == 7 and sum(warned) == 1


@pytest.mark.parametrize("slow", [True, False])
def test_a_training_warns_of_a_slow_loader_and_not_of_a_fast_one(tmp_path, monkeypatch, caplog, slow):
    monkeypatch.setattr(data_wait, "LEAST_STEPS", 2)

    def batches(epoch, start):
        for step in range(start, 5):
            if slow:
                time.sleep(0.3)
            yield SimpleNamespace(clips=torch.randn(2, 3, 4, 32, 32), labels=torch.tensor([0, 1]), paths=("a", "b"), bad=())

    model = x3d(size="tiny", num_classes=2, dropout=0.0, sgs=None)
    Trainer(
        model=model,
        optimizer=sgd(model, lr=0.01, momentum=0.9, weight_decay=0.0, nesterov=True),
        learning_rate_factor=lambda step, total: 1.0,
        batches=batches,
        steps_per_epoch=5,
        validate=lambda: {"top1": 0.0},
        normalise=torch.nn.Identity(),
        settings=SETTINGS,
        dist_info=DistInfo(0, 1, torch.device("cpu")),
        folder=tmp_path,
        identity={"config": {}, "choices": {}, "class_names": []},
    ).run()
    assert sum("waiting for data" in message for message in caplog.messages) == int(slow)


def test_the_benchmark_computes_the_waiting_time_from_a_log(tmp_path):
    """By hand: 4 steps at 1 s and 3 s, 2 at 0.5 s and 1 s; the first line, with the start of the workers, does not count."""
    values = [(1, 50.0, 1.0), (5, 1.0, 3.0), (7, 0.5, 1.0)]
    lines = [{"step": step, "split": "train", "data_s": data, "step_s": rest} for step, data, rest in values]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 7, "split": "val", "top1": 1.0}]))
    outcome = run_script("benchmarks/data_wait.py", "--run", str(tmp_path))
    assert outcome.code == 0 and "6 steps: 833.33 ms for data and 2333.3 ms for the rest of a step; waiting is 26.32% of the time" in outcome.out
