"""The event files of a run: scalars, histograms and hyperparameters, each step once, and no effect on the training."""

from __future__ import annotations

import json
import time
from collections import Counter

import numpy as np
import pytest
import torch
from monitored_run import CLASSES, events_of, job, pictures
from omegaconf import OmegaConf
from PIL import Image
from tensorboard.plugins.hparams.metadata import parse_experiment_plugin_data, parse_session_start_info_plugin_data

from atfr.cli.hyperparameters import hyperparameters
from atfr.engine.run import checkpoint
from atfr.engine.run.metric_logger import MetricLogger
from atfr.engine.validation import ClipResults, Validation


def test_the_histograms_count_the_clips_of_each_bins_and_gflops(run, plain):
    events = events_of(run / "tensorboard")
    bins, gflops = (events.Histograms(f"val_clips/{name}") for name in ("bins", "gflops"))
    assert [event.step for event in bins] == [event.step for event in gflops] == [2, 4]
    value = bins[-1].histogram_value
    counted = {limit - 0.5: count for limit, count in zip(value.bucket_limit, value.bucket) if count}
    assert counted == Counter(plain.bins)
    value = gflops[-1].histogram_value
    assert value.num == 9 and (value.min, value.max) == pytest.approx((min(plain.gflops), max(plain.gflops)))
    assert sum(value.bucket) == 9
    for limit, before, count in zip(value.bucket_limit[1:], value.bucket_limit, value.bucket[1:]):
        assert count <= sum(before - 1e-9 <= cost <= limit + 1e-9 for cost in plain.gflops)  # a cost may lie on an edge


def test_pictures_change_nothing_that_is_trained_and_without_them_none_is_written(run, videos, tmp_path):
    job(videos, tmp_path, "trainer.test=false", "trainer.tensorboard_pictures=0")
    first, second = (checkpoint.load(folder / "checkpoints/last.pt") for folder in (run, tmp_path))
    for part in ("model", "optimizer", "best_top1"):
        torch.testing.assert_close(first[part], second[part], rtol=0, atol=0)
    tags = events_of(tmp_path / "tensorboard").Tags()
    assert not tags["images"] and not tags["histograms"] and "val/top1" in tags["scalars"]


def test_a_run_that_resumes_shows_no_epoch_twice(tmp_path):
    def validation(prediction: int) -> Validation:
        clips = ClipResults(np.array([0, 2]), np.array([prediction] * 2), {"stem": np.array([3, 4])}, (8,), np.array([0.3, 0.4]), 0.8, CLASSES)
        return Validation({"top1": 50.0}, clips, (Image.new("RGB", (8, 8), (100 * prediction, 0, 0)),))

    for pieces in ([0, 2], [1]):
        log = MetricLogger(tmp_path)
        log.open(step=4 * (len(pieces) == 1), evaluated=2 * (len(pieces) == 1))  # the validation after step 4 was not saved
        for step, prediction in zip((2, 4)[-len(pieces) :], pieces):
            log.write_validation(validation(prediction), step=step, epoch=step // 2 - 1)
        log.close()
        time.sleep(1.01 - time.time() % 1)  # TensorBoard reads files of one second in the order of their names, number 10 before number 9
    events = events_of(tmp_path / "tensorboard")
    for tag in ("val_classes/confusion", "val_clips/accuracy_by_bins", "val_merges/clip_1"):
        assert list(pictures(events, tag)) == [2, 4]
    assert pictures(events, "val_merges/clip_1")[4].convert("RGB").getpixel((0, 0)) == (100, 0, 0)
    assert [event.step for event in events.Histograms("val_clips/bins")] == [event.step for event in events.Scalars("val/top1")] == [2, 4]


def test_the_scalars_of_steps_validations_and_the_test_are_in_one_run(run, plain):
    events = events_of(run / "tensorboard")
    names = ("loss", "lr", "top1", "top5", "step_s", "data_s", "clips_per_second", "memory_gib", "grad_norm", "sgs_width", "bins")
    for name in names:
        assert [event.step for event in events.Scalars(f"train/{name}")] == [1, 2, 3, 4], name
    assert 0.01 < events.Scalars("train/memory_gib")[-1].value < 64
    assert not any("lr_group" in tag for tag in events.Tags()["scalars"])  # all groups have one rate
    hits = [label == prediction for label, prediction in zip(plain.labels, plain.predictions)]
    assert [event.step for event in events.Scalars("val/top1")] == [2, 4]
    assert events.Scalars("val/top1")[-1].value == pytest.approx(100 * sum(hits) / 9)
    results = json.loads((run / "results.json").read_text())
    (tested,), (gflops,) = events.Scalars("test/top1"), events.Scalars("test/gflops")
    assert (tested.value, gflops.value) == pytest.approx((results["top1"], results["gflops"]["mean"]))
    assert not [path for path in (run / "tensorboard").iterdir() if path.is_dir()]


def test_the_hyperparameters_are_in_the_event_file_of_the_run(run):
    (events,) = [events for events in map(events_of, (run / "tensorboard").iterdir()) if "train/loss" in events.Tags()["scalars"]]
    content = events.PluginTagToContent("hparams")
    start = parse_session_start_info_plugin_data(content["_hparams_/session_start_info"])
    found = {name: value.number_value if value.HasField("number_value") else value.string_value for name, value in start.hparams.items()}
    expected = {"model": "x3d_sgs", "dataset": "videolist", "model/sgs": "atfr", "model.sgs.after": "stem", "model.sgs.keep_ratio": 0.5}
    expected |= {"optimizer.lr": 0.1, "trainer.batch_size": 3, "trainer.epochs": 2, "trainer.seed": 0, "dataset.clip.train_short_side": "32+40"}
    assert expected.items() <= found.items()
    assert not {"trainer.output_dir", "trainer.workers", "trainer.max_steps", "dataset.root", "trainer.tensorboard_pictures"} & set(found)
    metrics = {info.name.tag for info in parse_experiment_plugin_data(content["_hparams_/experiment"]).metric_infos}
    assert metrics == {"val/top1", "val/bins", "test/top1", "test/gflops"} and "_hparams_/session_end_info" in content


def test_runs_are_compared_by_their_budget_and_a_dense_network_has_all_of_it():
    def found(sgs: dict | None, *overrides: str) -> dict[str, str | float]:
        config = {"model": {"sgs": sgs}, "optimizer": {"lr": 0.1}, "trainer": {"batch_size": 4, "epochs": 1, "seed": 0, "ema": None, "class_balanced": True}}
        return hyperparameters(OmegaConf.create(config), {"model": "slowfast", "dataset": "ucf101", "model/sgs": "uniform", "optimizer": "sgd"}, overrides)

    usual = {"model": "slowfast", "dataset": "ucf101", "optimizer.lr": 0.1, "trainer.batch_size": 4, "trainer.epochs": 1, "trainer.seed": 0}
    dense = {"model/sgs": "off", "model.sgs.after": "none", "model.sgs.gflops": 1.0}
    assert found(None, "optimizer=sgd", "trainer.ema=null", "trainer.keep=1", "~hydra.sweep", "trainer.class_balanced=true") == {
        **usual, **dense, "optimizer": "sgd", "trainer.class_balanced": "true",
    }  # fmt: skip
    sampled = found({"after": ["slow.res3", "fast.res2"], "gflops": 0.4})
    assert sampled == {**usual, "model/sgs": "uniform", "model.sgs.after": "slow.res3+fast.res2", "model.sgs.gflops": 0.4}
