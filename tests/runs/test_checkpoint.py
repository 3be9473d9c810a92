"""Checkpoints and run folders: what was saved is not lost, and errors name the file."""

from __future__ import annotations

import json
import math
import os
import resource
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from atfr.engine.run import checkpoint
from atfr.engine.run.metric_logger import MetricLogger
from atfr.engine.run.run_dir import claim_folder
from atfr.utils.atomic_io import write_text

STATE = {"model": {"weight": torch.arange(3.0)}, "config": {"model": {"size": "S"}}, "choices": {}, "class_names": ["a", "b"]}


def test_a_loaded_checkpoint_equals_the_saved_one(tmp_path):
    path = tmp_path / "checkpoints" / "last.pt"
    checkpoint.save(STATE, path)
    loaded = checkpoint.load(path)
    assert loaded["config"] == STATE["config"]
    torch.testing.assert_close(loaded["model"]["weight"], torch.arange(3.0))
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]


def test_keep_is_the_number_of_newest_checkpoints_that_stay(tmp_path):
    path = tmp_path / "last.pt"
    for step in range(5):
        checkpoint.save({**STATE, "step": step}, path, keep=3)
    assert {p.name: checkpoint.load(p)["step"] for p in tmp_path.iterdir()} == {"last.pt": 4, "last-1.pt": 3, "last-2.pt": 2}
    checkpoint.save({**STATE, "step": 5}, path, keep=1)
    assert {p.name: checkpoint.load(p)["step"] for p in tmp_path.iterdir()} == {"last.pt": 5}


def test_a_full_disk_leaves_the_previous_checkpoint_intact_and_says_so(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(STATE, path)
    before = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # the kernel refuses to let a file grow beyond this, in the middle of the write
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
        with pytest.raises(OSError, match=r"last.pt could not be written \(File too large\); the previous one is intact"):
            checkpoint.save({**STATE, "more": torch.zeros(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_numpy_numbers_and_subclasses_are_saved_as_plain_types(tmp_path):
    values = {"top1": np.float64(0.1), "n": np.int32(3), "on": np.bool_(True), "half": np.float16(0.5), "text": np.str_("x"), "lists": [(np.float32(2),)]}
    checkpoint.save({**STATE, "config": values, "model": OrderedDict(weight=torch.ones(1))}, tmp_path / "last.pt")
    config = torch.load(tmp_path / "last.pt", weights_only=True)["config"]  # which refuses numpy's types
    assert config == {"top1": 0.1, "n": 3, "on": True, "half": 0.5, "text": "x", "lists": [(2.0,)]}
    assert {type(value) for value in config.values()} == {float, int, bool, str, list}


def test_saving_refuses_what_could_not_be_read_back_and_names_the_key(tmp_path):
    with pytest.raises(TypeError, match=r"state.optimizer.groups\[1\] in a checkpoint is of type set"):
        checkpoint.save({**STATE, "optimizer": {"groups": [1, {2}]}}, tmp_path / "last.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_or_foreign_file_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        checkpoint.load(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load(path)
    checkpoint.save(STATE, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="cannot be read: it is damaged"):
        checkpoint.load(path)
    torch.save({"weights": 1}, path)
    with pytest.raises(ValueError, match="lacks one of the keys model, config"):
        checkpoint.load(path)


@pytest.mark.parametrize("write", [lambda path: path.write_text('{"top1": 50.0}'), lambda path: torch.save({"x": Path()}, path)], ids=["json", "other types"])
def test_a_file_that_is_no_checkpoint_is_refused_without_the_advice_to_run_its_code(tmp_path, write):
    write(tmp_path / "x")
    with pytest.raises(ValueError, match="damaged or not a checkpoint of this project; give a run folder or a file of its checkpoints/") as error:
        checkpoint.load(tmp_path / "x")
    assert "weights_only" not in str(error.value)


def test_weights_of_another_model_are_refused_naming_what_does_not_fit(tmp_path):
    model = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"1 missing \(first: bias\), 1 unexpected \(first: gamma\), 1 of another shape \(first: weight\)"):
        checkpoint.load_weights(model, {"weight": torch.zeros(2, 4), "gamma": torch.zeros(1)}, tmp_path)


def test_a_text_file_is_flushed_before_it_is_renamed_and_a_full_disk_names_it(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *arguments, name=name, original=original: (calls.append(name), original(*arguments)))
    path = tmp_path / "run" / "results.json"
    write_text(path, "one")
    assert calls == ["fsync", "replace", "fsync"] and path.read_text() == "one"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limit[1]))  # a full disk, as far as this process can tell
    try:
        with pytest.raises(OSError, match=f"{path} could not be written .*; make room"):
            write_text(path, "x" * 20000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_text() == "one"


def opened(folder: Path, *, step: int, evaluated: int) -> MetricLogger:
    log = MetricLogger(folder)
    log.open(step=step, evaluated=evaluated)
    return log


def test_the_metrics_of_a_run_that_resumes_have_no_step_twice(tmp_path):
    log = opened(tmp_path, step=0, evaluated=0)
    for step in (10, 20, 30):
        log.write(step=step, epoch=0, split="train", values={"loss": 1.0 / step})
        log.write(step=step, epoch=0, split="val", values={"top1": 50.0})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "los')  # a kill in the middle of a line
    log = opened(tmp_path, step=20, evaluated=10)
    log.write(step=30, epoch=1, split="train", values={"loss": 0.5})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line["epoch"], line["split"]) for line in lines]
    # The validation after step 20 was not in the checkpoint: it will be done again.
    assert found == [(10, 0, "train"), (10, 0, "val"), (20, 0, "train"), (30, 1, "train")]


def test_tensorboard_shows_no_step_twice_and_loses_none_after_a_resume(tmp_path):
    def shown(tag: str) -> list[tuple[int, float]]:
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        return [(event.step, event.value) for event in events.Scalars(tag)]

    log = opened(tmp_path, step=0, evaluated=0)
    for step in (5, 10, 15, 20, 25):
        log.write(step=step, epoch=0, split="train", values={"loss": 1.0 / step if step != 15 else math.inf})
        if step % 10 == 0:
            log.write(step=step, epoch=0, split="val", values={"top1": 50.0 + step})
    log.close()
    time.sleep(1.01 - time.time() % 1)  # TensorBoard reads files of one second in the order of their names, number 10 before number 9
    log = opened(tmp_path, step=20, evaluated=10)  # killed in step 25, and the validation of step 20 was not saved
    log.write(step=20, epoch=0, split="val", values={"top1": 99.0})
    log.write(step=25, epoch=1, split="train", values={"loss": 0.5})
    log.close()
    assert shown("val/top1") == [(10, 60.0), (20, 99.0)]
    losses = shown("train/loss")
    assert [step for step, _ in losses] == [5, 10, 15, 20, 25] and losses[-1][1] == 0.5 and losses[3][1] == pytest.approx(0.05)


def test_a_run_folder_of_another_experiment_is_refused_naming_the_key(tmp_path):
    config = {"model": {"size": "S"}, "optimizer": {"lr": 0.1}, "trainer": {"workers": 2, "seed": 0}}
    claim_folder(tmp_path, config, "training", resume=True)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == config
    checkpoint.save(STATE, tmp_path / "checkpoints" / "last.pt")
    claim_folder(tmp_path, {**config, "trainer": {"workers": 0, "seed": 0}}, "training", resume=True)
    with pytest.raises(ValueError, match="holds another experiment: optimizer.lr is 0.1 there and 0.2 here"):
        claim_folder(tmp_path, {**config, "optimizer": {"lr": 0.2}}, "training", resume=True)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ValueError, match="config.yaml is damaged"):
        claim_folder(tmp_path, config, "training", resume=True)
    with pytest.raises(ValueError, match="already holds a run, and trainer.resume=false"):
        claim_folder(tmp_path, config, "training", resume=False)


def test_an_option_that_is_newer_than_a_run_folder_must_be_off(tmp_path):
    before = {"optimizer": {"lr": 0.1}}
    claim_folder(tmp_path, before, "training", resume=True)
    checkpoint.save(STATE, tmp_path / "checkpoints" / "last.pt")
    with pytest.raises(ValueError, match="holds another experiment: trainer.mixup is None there and 0.8 here"):
        claim_folder(tmp_path, {**before, "trainer": {"mixup": 0.8}}, "training", resume=True)
    claim_folder(tmp_path, {**before, "trainer": {"mixup": None, "class_balanced": False}}, "training", resume=True)
