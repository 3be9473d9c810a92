"""What TensorBoard and the examples of a test show, compared with predictions that a plain loop makes."""

from __future__ import annotations

import csv
import io
import json
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from run_tools import run_tool, small_job
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import parse_experiment_plugin_data, parse_session_start_info_plugin_data
from torch import nn
from training import SETTINGS, batch, network, train
from video_files import write_video

import atfr
from atfr.cli.classifier import Classifier
from atfr.cli.hyperparameters import hyperparameters
from atfr.cli.validation import spread
from atfr.data.clips import Clip, TestClips
from atfr.data.mixup import mixing
from atfr.data.transforms import Normalizer
from atfr.data.types import Video
from atfr.engine.evaluator import View
from atfr.engine.examples import KINDS, choose_examples, write_examples
from atfr.engine.optim import groups
from atfr.engine.run import checkpoint
from atfr.engine.run.metric_logger import MetricLogger
from atfr.engine.validation import ClipResults, Validation
from atfr.models.video_net import VideoNet
from atfr.viz.clips import merge_pictures
from atfr.viz.validation import accuracy_by_bins_picture, class_accuracy_picture, confusion_picture

CLASSES = ("fast", "slow", "still")
SPEED = {"fast": 4, "slow": 1, "still": 0}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Tiny videos of a square that moves at one of three speeds: 6 for training and 9 for validation."""
    root, rng = tmp_path_factory.mktemp("speeds"), np.random.default_rng(0)
    lists: dict[str, list[str]] = {"train": [], "test": []}
    for number in range(15):
        label = CLASSES[number % 3]
        frames = np.repeat(rng.integers(0, 60, (1, 32, 40, 3), dtype=np.uint8), 16, axis=0)
        for t, frame in enumerate(frames):
            left = SPEED[label] * t % 30
            frame[10:20, left : left + 10] = 230
        write_video(root / f"{number}.mp4", frames, codec="libx264")
        lists["train" if number < 6 else "test"].append(f"{number}.mp4,{label}")
    for split, lines in lists.items():
        (root / f"{split}.csv").write_text("path,label\n" + "\n".join(lines) + "\n")
    return root


def job(videos: Path, folder: Path, *more: str) -> None:
    outcome = run_tool("train", *small_job(videos, folder, "model.sgs.keep_ratio=0.5", "trainer.batch_size=3", "optimizer.lr=0.1", *more))
    assert outcome.code == 0, outcome.err


@pytest.fixture(scope="module")
def run(videos, tmp_path_factory) -> Path:
    """A run of two epochs of two steps."""
    folder = tmp_path_factory.mktemp("run")
    job(videos, folder, "trainer.tensorboard_pictures=3", "trainer.examples=2")
    return folder


def events_of(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "histograms": 0, "scalars": 0})
    events.Reload()
    return events


@dataclass
class Plain:
    """What the network of the last checkpoint says of each validation clip, one by one."""

    classifier: Classifier
    clips: list[torch.Tensor]
    labels: list[int]
    predictions: list[int]
    bins: list[int]
    gflops: list[float]

    def counts(self) -> np.ndarray:
        counts = np.zeros((3, 3), int)
        for label, prediction in zip(self.labels, self.predictions):
            counts[label, prediction] += 1
        return counts


@pytest.fixture(scope="module")
def plain(run, videos) -> Plain:
    classifier = atfr.load(run / "checkpoints/last.pt", device="cpu")
    assert classifier.class_names == CLASSES
    found = Plain(classifier, [], [], [], [], [])
    normalise = Normalizer(classifier.clip.mean, classifier.clip.std)
    for number in range(6, 15):
        clip = TestClips([Video(str(videos / f"{number}.mp4"), 0)], classifier.clip, views=1, crops=1)[0].clip
        with torch.inference_mode():
            logits, sampling = classifier.model(normalise(clip[None]), return_sampling=True)
        found.clips.append(clip)
        found.labels.append(number % 3)
        found.predictions.append(int(logits.argmax()))
        found.bins.append(sampling.bins[0][0])
        found.gflops.append(sampling.gflops.item())
    assert len(set(found.bins)) > 1 and len(set(found.predictions)) > 1, "the clips of this test are all alike"
    return found


def pictures(events: EventAccumulator, tag: str) -> dict[int, Image.Image]:
    """The pictures of a tag by step."""
    found = events.Images(tag)
    assert len({image.step for image in found}) == len(found), "a step is there twice"
    opened = {image.step: Image.open(io.BytesIO(image.encoded_image_string)) for image in found}
    for image in found:
        assert opened[image.step].format == "PNG" and opened[image.step].size == (image.width, image.height)
    return opened


def same(shown: Image.Image, drawn: Image.Image) -> bool:
    """Whether a picture of the event file is this one, reduced to the colours of a palette."""
    return shown.size == drawn.size and np.array_equal(shown.convert("RGB"), drawn.quantize(256, method=2).convert("RGB"))


def test_the_confusion_matrix_and_the_accuracy_of_each_class_are_those_of_a_plain_loop(run, plain):
    events, counts = events_of(run / "tensorboard"), plain.counts()
    moved = counts.copy()
    moved[0] = moved[0][[1, 0, 2]]
    for tag, draw in (("confusion", confusion_picture), ("accuracy", class_accuracy_picture)):
        shown = pictures(events, f"val_classes/{tag}")
        assert list(shown) == [2, 4]
        assert same(shown[4], draw(counts, CLASSES)) and not same(shown[4], draw(moved, CLASSES))


def test_the_accuracy_by_bins_is_that_of_a_plain_loop(run, plain):
    right, total = np.zeros(9, int), np.zeros(9, int)
    for label, prediction, bins in zip(plain.labels, plain.predictions, plain.bins):
        total[bins] += 1
        right[bins] += label == prediction
    shown = pictures(events_of(run / "tensorboard"), "val_clips/accuracy_by_bins")
    assert list(shown) == [2, 4] and same(shown[4], accuracy_by_bins_picture([right], [total], ["stem"]))


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


def test_the_merges_of_the_same_clips_of_each_class_are_drawn_in_each_epoch(run, plain):
    events = events_of(run / "tensorboard")
    normalise = Normalizer(plain.classifier.clip.mean, plain.classifier.clip.std)
    # The first clips of the three classes, in the order of the list.
    drawn = merge_pictures(plain.classifier.model, plain.clips[:3], normalise=normalise, class_names=CLASSES, labels=plain.labels[:3])
    for number in range(3):
        shown = pictures(events, f"val_merges/clip_{number + 1}")
        assert list(shown) == [2, 4] and same(shown[4], drawn[number])
    assert sorted(tag for tag in events.Tags()["images"] if "merges" in tag) == [f"val_merges/clip_{number}" for number in (1, 2, 3)]


def test_a_picture_shows_another_assignment_and_leaves_the_mode_and_the_random_numbers_alone(plain):
    model, clips = plain.classifier.model, plain.clips[:1]
    draw = {"normalise": Normalizer(plain.classifier.clip.mean, plain.classifier.clip.std), "class_names": CLASSES}
    (before,) = merge_pictures(model, clips, **draw)
    layer, width = model.sgs["stem"], model.sgs["stem"].width.clone()
    model.train()
    state = torch.random.get_rng_state()
    try:
        layer.width.mul_(10)
        (after,) = merge_pictures(model, clips, **draw)
        assert all(module.training for module in model.modules()) and torch.equal(state, torch.random.get_rng_state())
    finally:
        layer.width.copy_(width)
        model.eval()
    assert after.size == before.size and not np.array_equal(after, before)


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


@pytest.mark.parametrize("parts", [1, 3])
def test_training_accuracy_is_that_of_the_networks_own_logits(tmp_path, parts):
    wide = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(3, 9))
    model = VideoNet(wide, stages={}, sgs=None)
    clips = batch(0)
    with torch.no_grad():
        rows = model(clips.clips).tolist()
    ranks = [sorted(range(9), key=lambda name: -row[name]).index(label) for row, label in zip(rows, clips.labels.tolist())]
    train(tmp_path, [clips], replace(SETTINGS, accumulate=parts), model)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert (line["top1"], line["top5"]) == (100 * sum(rank < 1 for rank in ranks) / 8, 100 * sum(rank < 5 for rank in ranks) / 8)


def test_mixed_clips_have_no_training_accuracy_and_another_rate_of_the_head_is_logged(tmp_path):
    model = network()
    optimizer = torch.optim.SGD(groups(model, lr=0.1, weight_decay=0.0, head_lr=10.0))
    train(tmp_path, [batch(0), batch(1)], model=model, optimizer=optimizer, mix=mixing(mixup=0.8, cutmix=None, num_classes=3, seed=0))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["lr"], line["lr_group_2"]) for line in lines if line["split"] == "train"] == [(0.1, 1.0)] * 2
    assert not any("top1" in line or "lr_group_1" in line for line in lines if line["split"] == "train")


def test_shown_clips_are_of_as_many_classes_as_possible():
    def videos(labels: str) -> list[Video]:
        return [Video(str(number), int(label)) for number, label in enumerate(labels)]

    assert spread(videos("0011223344"), 4) == [0, 2, 4, 6]
    assert spread(videos("0123456789"), 2) == [0, 5]
    assert spread(videos("000111"), 4) == [0, 3, 1, 4]
    assert spread(videos("000111"), 4, without={0, 3}) == [1, 4, 2, 5]
    assert spread(videos("01"), 4) == [0, 1]


def view(video: int, number: int, *, label: int = 0, score: float = 0.9) -> View:
    """A clip whose prediction is class 0."""
    return View(video, number, f"{video}.mp4", label, np.array([score, 1 - score], dtype=np.float32), (1,))


def test_examples_are_the_cheapest_and_the_dearest_of_different_videos():
    rows = [(view(0, 0), 5.0), (view(0, 1), 1.0), (view(1, 0), 1.0), (view(1, 1), 9.0), (view(2, 0, score=0.95), 1.0), (view(3, 0, label=1), 2.0),
            (view(4, 0), 7.0), (view(5, 0, label=1), 8.0), (view(5, 1, label=1), 8.5), (view(6, 0), 6.0)]  # fmt: skip
    found = choose_examples([one for one, _ in rows], [cost for _, cost in rows], 2)
    assert [(kind, one.video, one.view, cost) for kind, one, cost in found] == [
        ("cheapest right", 2, 0, 1.0),  # the surest of those that cost the same
        ("cheapest right", 0, 1, 1.0),
        ("dearest right", 1, 1, 9.0),
        ("dearest right", 4, 0, 7.0),
        ("dearest wrong", 5, 1, 8.5),
        ("dearest wrong", 3, 0, 2.0),
    ]
    assert [kind for kind, _, _ in choose_examples([view(0, 0)], [1.0], 2)] == ["cheapest right"]
    assert choose_examples([one for one, _ in rows], [cost for _, cost in rows], 0) == []


def listed(folder: Path) -> list[dict]:
    """The entries of examples.json, whose files are PNGs, and the only ones."""
    entries = json.loads((folder / "examples/examples.json").read_text())
    assert {path.name for path in (folder / "examples").iterdir()} == {"examples.json", *(entry["file"] for entry in entries)}
    for entry in entries:
        with Image.open(folder / "examples" / entry["file"]) as picture:
            assert picture.format == "PNG" and picture.width > 1500 and picture.height > 300
    return entries


def test_a_test_lists_clips_of_its_predictions_and_draws_them(run):
    rows = {(row["video"], int(row["view"])): row for row in csv.DictReader((run / "predictions.csv").open())}
    entries = listed(run)
    assert entries and {entry["kind"] for entry in entries} <= set(KINDS)
    for entry in entries:
        assert list(entry) == ["kind", "video", "view", "label", "prediction", "score", "bins", "gflops", "file"]
        row = rows[entry["video"], entry["view"]]
        assert [row[name] for name in ("label", "prediction", "bins")] == [entry[name] for name in ("label", "prediction", "bins")]
        assert [float(row[name]) for name in ("score", "gflops")] == pytest.approx([entry["score"], entry["gflops"]], abs=1e-4)
        assert (entry["label"] == entry["prediction"]) == entry["kind"].endswith("right")
    for kind, best in (("cheapest right", min), ("dearest wrong", max)):
        costs = [float(row["gflops"]) for row in rows.values() if (row["label"] == row["prediction"]) == kind.endswith("right")]
        found = [entry["gflops"] for entry in entries if entry["kind"] == kind]
        assert bool(found) == bool(costs) and (not found or found[0] == pytest.approx(best(costs)))


def test_a_later_test_replaces_the_pictures(run, plain, videos, tmp_path):
    model, clip = plain.classifier.model, plain.classifier.clip
    clips = TestClips([Video(str(videos / f"{number}.mp4"), number % 3) for number in range(6, 15)], clip, views=2, crops=1)
    views = [View(i, 1, "", label, np.eye(3)[found], (bins,)) for i, (label, found, bins) in enumerate(zip(plain.labels, plain.predictions, plain.bins))]
    options = {"table": model.gflops_table((3, 8, 32, 32)), "normalise": Normalizer(clip.mean, clip.std), "class_names": CLASSES, "folder": tmp_path}
    for each in (3, 1, 0):
        write_examples(model, views, clips, each=each, **options)
        if each:
            assert max(Counter(entry["kind"] for entry in listed(tmp_path)).values()) == each
    assert not list((tmp_path / "examples").iterdir())


class Unreadable:
    """Clips of which only those of video 1 can be read."""

    views, crops = 3, 1

    def __getitem__(self, item: int) -> Clip:
        clip = torch.zeros(3, 8, 32, 32, dtype=torch.uint8) if item == 3 + 2 else None
        return Clip(clip, 0, item // 3, item % 3, f"{item // 3}.mp4", error=None if clip is not None else "the disk is gone")


def test_a_clip_that_cannot_be_read_again_is_left_out_and_a_dense_network_gets_none(plain, tmp_path, caplog):
    views = [replace(view(number, 2), bins=(plain.bins[0],)) for number in (0, 1)]
    model, options = plain.classifier.model, {"normalise": Normalizer([0.4] * 3, [0.2] * 3), "class_names": CLASSES, "folder": tmp_path}
    table = model.gflops_table((3, 8, 32, 32))
    write_examples(model, views, Unreadable(), each=2, table=table, **options)
    assert [entry["video"] for entry in listed(tmp_path)] == ["1.mp4"] and "no example of 0.mp4: the disk is gone" in caplog.text
    write_examples(network(), views, Unreadable(), each=2, table=table, **options)
    assert not list((tmp_path / "examples").iterdir())


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


def test_charts_of_many_clips_have_no_bar_or_line_that_cannot_be_drawn():
    names = [f"class {number}" for number in range(400)]
    for rate in (0.0025, 0.3):
        counts = np.random.default_rng(0).binomial(50, rate, (400, 400)) + np.eye(400, dtype=int)
        counts[7] *= 1000
        assert class_accuracy_picture(counts, names).width > 0 and confusion_picture(counts, names).width > 0
    for total in (9_999, 20_000, 1_000_000):
        clips = np.zeros(9, dtype=int)
        clips[4] = total
        for right in (0, 1, total // 400, total):
            picture = accuracy_by_bins_picture([clips * right // total], [clips], ["stem"])
            blue = (np.array(picture) == [0x4C, 0x78, 0xC8]).all(axis=2).any(axis=1).sum()  # height of the bar
            assert blue == pytest.approx(220 * right / total, abs=1)


@pytest.mark.slow
def test_a_picture_that_cannot_be_drawn_costs_neither_the_validation_nor_the_results(videos, tmp_path, monkeypatch, capfd):
    def fails(*_: object, **__: object) -> None:
        raise ValueError("no ink")

    monkeypatch.setattr("atfr.viz.clips.merge_picture", fails)
    monkeypatch.setattr("atfr.engine.run.metric_logger.add_validation", fails)
    outcome = run_tool("train", *small_job(videos, tmp_path, "model/sgs=uniform", "model.sgs.keep_ratio=0.5", "trainer.tensorboard_pictures=1", "trainer.examples=1", "trainer.epochs=1"))
    assert outcome.code == 0, outcome.err
    assert "TensorBoard lacks pictures of this validation: ValueError: no ink" in outcome.err + outcome.out
    assert f"{tmp_path} has no examples: ValueError: no ink" in outcome.err + outcome.out
    assert (tmp_path / "checkpoints/best.pt").exists() and (tmp_path / "results.json").exists()
