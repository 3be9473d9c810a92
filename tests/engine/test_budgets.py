"""Choosing how many features to keep for a given cost, and the program that does it without training."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import dataclass

import pytest
import torch
from omegaconf import OmegaConf
from run_tools import run_tool, small_job

from atfr.cli import builders
from atfr.engine.budgets import keep_ratio_for, refined
from atfr.engine.distributed.preemption import TRY_AGAIN
from atfr.engine.run import checkpoint
from atfr.models.backbones.slowfast import slowfast
from atfr.models.backbones.x3d import x3d
from atfr.models.sgs.config import SGSConfig


@dataclass
class Table:
    """Costs by a formula: a fixed part, and the rest in proportion to ceil(B' / step), mean over the layers."""

    fixed: float
    step: int = 1
    frames: tuple[int, ...] = (16,)
    depths: tuple[int, ...] = (0,)
    dense: float = 2.0
    fewest: int = 1

    @property
    def least(self) -> tuple[int, ...]:
        return (self.fewest,) * len(self.frames)

    @property
    def most(self) -> tuple[int, ...]:
        return self.frames

    def at(self, bins: tuple[int, ...]) -> float:
        stairs = [-(-kept // self.step) * self.step / frames for kept, frames in zip(bins, self.frames)]
        return self.dense * (self.fixed + (1 - self.fixed) * sum(stairs) / len(stairs))


def test_the_keep_ratio_of_a_budget_solves_the_cost_for_the_mean_number_of_features():
    assert keep_ratio_for(Table(0.2), 0.5) == pytest.approx(6 / 16)
    assert keep_ratio_for(Table(0.2), 0.52) == pytest.approx((0.52 - 0.2) / 0.8)
    assert keep_ratio_for(Table(0.2), 1.0) == 1


def test_a_baseline_keeps_the_most_features_that_do_not_exceed_the_budget():
    assert keep_ratio_for(Table(0.2), 0.52, whole=True) == 6 / 16
    assert keep_ratio_for(Table(0.0, step=4), 0.6, whole=True) == 8 / 16  # 5 to 8 features cost the same half


def test_layers_side_by_side_keep_one_ratio_and_a_layer_behind_another_keeps_it_of_what_that_one_kept():
    assert keep_ratio_for(Table(0.2, frames=(32, 8), depths=(0, 0)), 0.5) == pytest.approx(6 / 16)
    golden = (5**0.5 - 1) / 2  # r + r^2 = 1
    assert keep_ratio_for(Table(0.0, frames=(64, 64), depths=(0, 1)), 0.5) == pytest.approx(golden, abs=1 / 64)


def test_a_budget_below_the_cost_of_one_feature_is_refused_with_that_cost():
    with pytest.raises(ValueError, match=r"budget of 0.2 x dense.*one feature a clip costs 0.250 x dense"):
        keep_ratio_for(Table(0.2), 0.2)
    with pytest.raises(ValueError, match=r"budget of 0.5 x dense.*the fewest features that the network runs on, 8 of 16, cost 0.600 x dense"):
        keep_ratio_for(Table(0.2, fewest=8), 0.5)


def test_a_budget_for_clips_of_one_feature_is_refused_as_nothing_is_left_to_sample():
    with pytest.raises(ValueError, match=r"budget of 0.5 x dense.*nothing to sample; set dataset.clip.frames higher"):
        keep_ratio_for(Table(0.2, frames=(1,)), 0.5)


def test_a_keep_ratio_is_refined_to_what_the_clips_themselves_cost():
    assert refined(0.4, 0.25, lambda ratio: ratio**2) == pytest.approx(0.5, abs=0.4 / 2**8)
    assert refined(0.9, 0.25, lambda ratio: ratio**2) == pytest.approx(0.5, abs=0.6 / 2**8)
    assert refined(0.4, 0.25, lambda ratio: 0.2) == pytest.approx(0.6)  # every ratio near it is cheap enough


@pytest.mark.slow
def test_the_pathways_of_slowfast_have_a_table_and_lie_side_by_side():
    model = slowfast(size="4x16-R50", num_classes=2, sgs=SGSConfig())
    table = model.gflops_table((3, 32, 32, 32))
    assert (table.frames, table.depths) == ((4, 32), (0, 0))
    assert 0 < table.at((2, 16)) < 0.6 * table.dense


@pytest.mark.parametrize(
    "preset, options, decides",
    [
        ("atfr", {"width": 0.3}, "width"),
        ("reference", {}, "similarity=distance_to_mean, scale=relative"),
        ("identity", {}, "similarity=none"),
        ("uniform", {"num_bins": 4}, "num_bins"),
    ],
)
def test_a_layer_that_follows_no_budget_takes_none_and_says_what_decides_instead(preset, options, decides):
    (layer,) = x3d(size="tiny", num_classes=2, sgs=SGSConfig.from_preset(preset, **options)).sgs.values()
    with pytest.raises(ValueError, match=f"follows no budget, since its {decides}"):
        layer.set_budget(0.5)


def test_a_baseline_keeps_its_keep_ratio_at_once_and_an_adaptive_layer_up_to_all_features():
    (uniform,) = x3d(size="tiny", num_classes=2, sgs=SGSConfig.from_preset("uniform")).sgs.values()
    uniform.set_budget(0.75)
    assert uniform.most_bins(16) == 12
    (adaptive,) = x3d(size="tiny", num_classes=2, sgs=SGSConfig()).sgs.values()
    adaptive.set_budget(0.75)
    assert adaptive.keep_ratio == 0.75 and adaptive.most_bins(16) == 16


@pytest.fixture(scope="module")
def dense(small_videos, tmp_path_factory) -> str:
    """A small dense network's checkpoint."""
    folder = tmp_path_factory.mktemp("dense")
    outcome = run_tool("train", *small_job(small_videos, folder, "model=x3d", "trainer.max_steps=1", "trainer.statistics_clips=0", "trainer.test=false"))
    assert outcome.code == 0, outcome.err
    return f"{folder}/checkpoints/last.pt"


def calibrate(small_videos, folder, dense, *more: str):
    job = small_job(small_videos, folder, "model=x3d_sgs", "model.sgs.after=stem", "dataset.clip.views=1", f"model.weights={dense}", *more)
    return run_tool("calibrate", *job)


def calibrated(small_videos, folder, dense, *more: str):
    outcome = calibrate(small_videos, folder, dense, *more)
    assert outcome.code == 0, outcome.err
    return json.loads((folder / "calibration.json").read_text()), outcome.out


@pytest.mark.parametrize("preset", ["atfr", pytest.param("uniform", marks=pytest.mark.slow)])
def test_a_dense_network_is_calibrated_to_budgets_and_each_result_can_be_tested_again(preset, small_videos, dense, tmp_path):
    entries, out = calibrated(small_videos, tmp_path, dense, f"model/sgs={preset}", "budgets=[0.5,0.8]")
    assert [entry["budget"] for entry in entries] == [0.5, 0.8] and "budget 0.80: top-1" in out
    costs = [entry["gflops"]["mean"] / entry["gflops"]["dense"] for entry in entries]
    assert costs[0] < costs[1]
    if preset == "uniform":
        assert costs[0] <= 0.5 and costs[1] <= 0.8
    outcome = run_tool("test", f"checkpoint={tmp_path}/checkpoints/budget-0.5.pt", f"trainer.output_dir={tmp_path}/again")
    assert outcome.code == 0, outcome.err
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert {key: again[key] for key in ("top1", "gflops", "bins")} == {key: entries[0][key] for key in ("top1", "gflops", "bins")}


def test_a_run_is_calibrated_with_the_network_the_dataset_and_the_clip_of_its_training(small_videos, tmp_path):
    job = small_job(small_videos, tmp_path / "run", "model=x3d_sgs", "model/sgs=uniform", "dataset.clip.frames=4", "trainer.max_steps=1", "trainer.test=false")
    assert run_tool("train", *job).code == 0
    outcome = run_tool("calibrate", f"checkpoint={tmp_path}/run", "budgets=[0.8]", "dataset.clip.views=1")
    assert outcome.code == 0, outcome.err
    folder = tmp_path / "run" / "calibrated"
    (entry,) = json.loads((folder / "calibration.json").read_text())
    assert f"saved {folder}/calibration.json and {folder}/checkpoints/budget-B.pt" in outcome.out and "on the training clips)" in outcome.out
    assert entry["bins"]["frames"] == 4 and entry["num_views"] == 4
    # The fixed layer keeps as many features of all clips.
    assert entry["training_clips_gflops"] == pytest.approx(entry["gflops"]["mean"] / entry["gflops"]["dense"])
    trained, calibrated = (OmegaConf.load(file) for file in (tmp_path / "run" / "config.yaml", folder / "config.yaml"))
    for key in ("model.size", "model.sgs.similarity", "dataset.root", "dataset.clip.crop_size", "trainer.batch_size", "trainer.epochs"):
        assert OmegaConf.select(calibrated, key) == OmegaConf.select(trained, key)
    outcome = run_tool("test", f"checkpoint={folder}/checkpoints/budget-0.8.pt", f"trainer.output_dir={tmp_path}/again")
    assert outcome.code == 0 and json.loads((tmp_path / "again/results.json").read_text())["gflops"] == entry["gflops"]


def test_a_dense_run_is_calibrated_as_the_same_network_with_sgs(small_videos, dense, tmp_path):
    outcome = run_tool("calibrate", f"checkpoint={dense}", "budgets=[0.8,0.8]", "dataset.clip.views=1")
    assert outcome.code == 1 and "model=x3d has no SGS layer to calibrate: add model=x3d_sgs" in outcome.err
    outcome = run_tool("calibrate", f"checkpoint={dense}", "model=x3d_sgs", "model/sgs=uniform", "budgets=[0.8,0.8]", "dataset.clip.views=1", f"trainer.output_dir={tmp_path}")
    assert outcome.code == 0 and outcome.out.count("budget 0.80") == 1, outcome.err
    state = checkpoint.load(tmp_path / "checkpoints/budget-0.8.pt")
    assert state["choices"]["model"] == "x3d_sgs" and state["choices"]["model/sgs"] == "uniform" and state["config"]["model"]["size"] == "tiny"


@pytest.mark.slow
def test_the_same_command_leaves_what_is_measured_and_adds_other_budgets(small_videos, dense, tmp_path):
    first, _ = calibrated(small_videos, tmp_path, dense, "budgets=[0.8]")
    written = (tmp_path / "checkpoints" / "budget-0.8.pt").stat().st_mtime_ns
    both, _ = calibrated(small_videos, tmp_path, dense, "budgets=[0.8,0.6]", "trainer.workers=0")
    assert [entry["budget"] for entry in both] == [0.6, 0.8] and both[1] == first[0]
    assert (tmp_path / "checkpoints" / "budget-0.8.pt").stat().st_mtime_ns == written
    outcome = calibrate(small_videos, tmp_path, dense, "model/sgs=uniform")
    assert outcome.code == 1 and "holds another experiment: model.sgs" in outcome.err


@pytest.mark.slow
def test_ctrl_c_in_a_calibration_keeps_the_budgets_that_are_done_and_other_weights_are_refused(small_videos, dense, tmp_path, monkeypatch):
    run_views, measured = builders.run_views, []

    def told(*arguments, title, **more):
        measured.append(title)
        if len(measured) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(20)
        return run_views(*arguments, title=title, **more)

    monkeypatch.setattr(builders, "run_views", told)
    job = small_job(small_videos, tmp_path / "run", "model=x3d_sgs", "model/sgs=uniform", "dataset.clip.frames=4", "budgets=[0.8,0.6]")
    weights = tmp_path / "moved.pt"
    outcome = run_tool("calibrate", *job, f"model.weights={dense}")
    assert outcome.code == TRY_AGAIN and outcome.err == "stopped by SIGINT in the calibration; run the same command again to continue\n"
    shutil.copy(dense, weights)
    assert run_tool("calibrate", *job, f"model.weights={weights}").code == 0
    assert measured == ["budget 0.8", "budget 0.6", "budget 0.6"]
    weights.write_bytes(weights.read_bytes() + b"\0")
    outcome = run_tool("calibrate", *job, f"model.weights={weights}")
    assert outcome.code == 1 and "names other weights than those that" in outcome.err, outcome.err


@pytest.mark.slow
def test_a_training_and_a_calibration_do_not_take_each_others_folder(small_videos, dense, tmp_path):
    job = small_job(small_videos, tmp_path, "model=x3d_sgs", f"model.weights={dense}", "model.sgs.keep_ratio=0.5", "dataset.clip.frames=4", "trainer.max_steps=1", "trainer.test=false")
    assert run_tool("train", *job).code == 0
    config = (tmp_path / "config.yaml").read_text()
    outcome = run_tool("calibrate", *job, "budgets=[0.9]")
    assert outcome.code == 1 and "holds a training, and this is a calibration" in outcome.err
    assert (tmp_path / "config.yaml").read_text() == config


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["model=x3d", "model.weights=DENSE"], "model=x3d has no SGS layer to calibrate: add model=x3d_sgs"),
        (["model.weights=null"], "set checkpoint to a run of tools/train.py, or model.weights or init_from"),
        (["model.weights=THREE"], "leaves blocks.5.proj.weight, blocks.5.proj.bias untrained, and nothing is trained here: choose the network and the dataset (2 classes now)"),
        (["model.weights=DENSE", "budgets=[1.5]"], "must be shares of the dense GFLOPs"),
        (["model.weights=DENSE", "model.sgs.width=0.3", "budgets=[0.9]"], "follows no budget, since its width"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_in_one_line(arguments, message, small_videos, dense, tmp_path):
    torch.save(x3d(size="tiny", num_classes=3).state_dict(), tmp_path / "three.pt")
    arguments = [argument.replace("DENSE", dense).replace("THREE", str(tmp_path / "three.pt")) for argument in arguments]
    outcome = run_tool("calibrate", *small_job(small_videos, tmp_path, *arguments))
    assert outcome.code == 1 and message in outcome.err and len(outcome.err.strip().splitlines()) == 1
