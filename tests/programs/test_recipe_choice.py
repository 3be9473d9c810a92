"""A command that names a dataset and no experiment runs the recipe of its network on that dataset, and says so."""

from __future__ import annotations

import json
import os
import re

import pytest
from miniatures import miniature
from run_tools import ROOT, run_tool, small_job

from atfr.cli.recipe import ADDED, find_recipe, recipes


@pytest.fixture(autouse=True)
def _no_recipe_of_an_earlier_command():
    yield
    os.environ.pop(ADDED, None)


SMALL = ["model.size=tiny", "dataset.clip.frames=8", "dataset.clip.crop_size=32", "dataset.clip.train_short_side=[32,40]", "dataset.clip.test_short_side=32"]


@pytest.mark.parametrize(
    "model,size,dataset,name,published",
    [
        ("x3d_sgs", "S", "kinetics400", "x3d/kinetics400", True),
        ("x3d", "L", "kinetics400", "x3d/kinetics400_L", True),
        ("x3d", "XL", "kinetics400", "x3d/kinetics400_XL", False),
        ("x3d", "tiny", "kinetics400", "x3d/kinetics400", False),
        ("r2plus1d", "R50", "kinetics400", "r2plus1d/kinetics400", True),
        ("r2plus1d_sgs", "18", "kinetics400", "r2plus1d/kinetics400_18", True),
        ("slow", "R50", "something_something_v2", "slow/ssv2", True),
        ("slow", "R50", "ucf101", "slow/ucf101", True),
        ("r2plus1d", "18", "hmdb51", "r2plus1d/hmdb51_18", False),  # published with 34 layers
        ("resnet3d", "18", "kinetics400", "resnet3d/kinetics400", False),
        ("resnet3d_sgs", "18", "mini_kinetics", "resnet3d/mini_kinetics", True),
        # None is published: the network's own on Kinetics-400, or what any network can be fine-tuned with.
        ("s3d", "base", "kinetics600", "s3d/kinetics400", False),
        ("x3d", "XL", "mini_kinetics", "x3d/kinetics400_XL", False),
        ("custom_sgs", None, "kinetics400", "base/pyslowfast", False),
        ("r2plus1d", "R50", "ucf101", "finetune/ucf101", False),
        ("csn", "R101", "something_something_v2", "base/pyslowfast_ssv2", False),
        ("x3d_sgs", "S", "synthetic", "x3d/synthetic", True),
    ],
)
def test_the_recipe_is_the_published_one_or_else_the_nearest(model, size, dataset, name, published):
    recipe = find_recipe(model=model, size=size, dataset=dataset)
    assert (recipe.name, recipe.published) == (name, published)


@pytest.mark.parametrize("dataset", ["synthetic", "videolist"])
def test_there_is_no_recipe_for_videos_of_ones_own_or_a_large_network_on_the_built_in_ones(dataset):
    assert find_recipe(model="csn", size="R101", dataset=dataset) is None


def test_every_recipe_that_has_a_source_is_chosen_by_some_network_size_and_dataset():
    datasets = {"ssv2": "something_something_v2"}
    for name in recipes():
        network, _, rest = name.partition("/")
        dataset, _, size = rest.rpartition("_") if re.search(r"_(18|X?L)$", rest) else (rest, "", "")
        model = "r3d" if network == "finetune" else network
        assert find_recipe(model=model, size=size or None, dataset=datasets.get(dataset, dataset)).name == name


def plan(*overrides: str) -> tuple[int, str, str]:
    outcome = run_tool("train", *overrides, "dry_run=true", "trainer.accelerator=cpu")
    return outcome.code, outcome.out, outcome.err


def option(out: str, key: str) -> list[str]:
    """The value of an option in a dry run's table, and the rest of its line."""
    return re.search(rf"^  {re.escape(key)} +(\S+) +(.*)$", out, flags=re.M).groups()


def test_a_dry_run_shows_the_recipe_and_where_each_value_comes_from_and_runs_nothing(tmp_path, monkeypatch):
    data = miniature("kinetics400", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    code, out, err = plan(*data, "model=x3d_sgs", *SMALL, "model.sgs.keep_ratio=0.5", "trainer.batch_size=2", "trainer.max_steps=50", "optimizer.momentum=0.8")
    assert code == 0, err
    assert "recipe: experiment=x3d/kinetics400 (the nearest, since none is published for x3d_sgs tiny on kinetics400); 300 epochs, batches of 2, optimizer.lr=0.1" in out
    assert "warning: the recipe's optimizer.lr=0.1 is for batches of 128: optimizer.lr=0.00156 goes with trainer.batch_size=2" in out
    assert option(out, "trainer.epochs") == ("300", "configs/experiment/x3d/kinetics400.yaml")
    assert option(out, "dataset.clip.fps") == ("30", "configs/experiment/base/pyslowfast.yaml")
    assert option(out, "optimizer.momentum") == ("0.8", "command line")
    assert option(out, "dataset.clip.views") == ("10", "configs/dataset/kinetics400.yaml")
    assert option(out, "dataset.clip.stride") == ("4", "configs/dataset/clip/default.yaml: ${model.clip.stride}")
    # Six training videos in batches of two, for 300 epochs, of which 35 warm up.
    assert "3 an epoch, 900 in 300 epochs, stops after 50; warm-up 105 steps" in out
    assert "6 train, 4 val, 4 test" in out and "1 train, 1 val, 1 test" not in out
    assert "1, started by this command" in out and "2 clips, 2 a process" in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_options_and_groups_of_the_command_line_win_over_the_recipe(tmp_path, monkeypatch):
    data = miniature("kinetics400", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    code, out, err = plan(*data, "model=x3d", *SMALL, "optimizer=adamw", "optimizer.lr=0.003", "trainer.epochs=7", "schedule=multistep")
    assert code == 0, err
    assert option(out, "trainer.epochs") == ("7", "command line") and option(out, "optimizer.lr") == ("0.003", "command line")
    # The recipe's optimizer and schedule are SGD and a cosine, and nothing of them is left.
    assert option(out, "optimizer.weight_decay") == ("0.05", "configs/optimizer/adamw.yaml")
    assert "optimizer.momentum" not in out and "schedule.end_factor" not in out
    assert "without its optimizer and schedule; 7 epochs" in out and "warning" not in out
    assert option(out, "schedule.gamma") == ("0.1", "configs/schedule/multistep.yaml")
    assert "model.sgs.after" not in out and "runs dense" in out


def test_no_experiment_can_be_asked_for(tmp_path, monkeypatch):
    data = miniature("kinetics400", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    code, out, err = plan(*data, "model=x3d", *SMALL, "~experiment")
    assert code == 0, err
    assert "recipe" not in out and option(out, "trainer.epochs") == ("4", "configs/trainer/default.yaml")


@pytest.mark.parametrize("null", [[], pytest.param(["model.weights=null"], marks=pytest.mark.slow)])
def test_without_weights_to_fine_tune_the_network_trains_from_scratch_and_a_line_says_so(tmp_path, monkeypatch, null):
    data = miniature("ucf101", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    code, out, err = plan(*data, "model=x3d", *SMALL, *null)
    assert code == 0, err
    assert "recipe: experiment=x3d/kinetics400 (the nearest, since none is published for x3d tiny on ucf101); 300 epochs" in out
    assert "with model.weights=FILE it runs experiment=finetune/ucf101, which starts from them" in out
    assert option(out, "trainer.epochs") == ("300", "configs/experiment/x3d/kinetics400.yaml")
    assert option(out, "model.weights")[0] == "null" and "dataset      ucf101, 2 classes" in out


def test_with_weights_the_network_is_fine_tuned(tmp_path, monkeypatch):
    data = miniature("ucf101", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x3d.pth").touch()
    code, out, err = plan(*data, "model=x3d", *SMALL, "model.weights=x3d.pth")
    assert code == 0, err
    assert "recipe: experiment=finetune/ucf101 (the nearest" in out and "from scratch" not in out
    assert option(out, "trainer.epochs") == ("40", "configs/experiment/base/mmaction2_finetune.yaml")
    assert option(out, "model.weights") == ("x3d.pth", "command line")


@pytest.mark.slow
def test_a_dry_run_without_the_data_says_all_the_rest_and_ends_with_the_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = plan("dataset=kinetics400", "model=x3d_sgs", *SMALL)
    assert code == 1 and err.startswith("error: dataset kinetics400: root ") and err.count("\n") == 1
    assert "network" in out and "total" in out and "an epoch" not in out


def test_videos_of_ones_own_keep_the_defaults_and_a_line_says_so_once(tmp_path, small_videos):
    outcome = run_tool("train", *small_job(small_videos, tmp_path / "run", "trainer.test=false", "trainer.max_steps=1", "trainer.accelerator=cpu"))
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("recipe:") == 1
    assert "recipe: none for x3d_sgs on videolist (add experiment=base/pyslowfast for a published one); the defaults of configs/ are used: 2 epochs, batches of 4, optimizer.lr=0.05" in outcome.out
    assert "validation: videolist has no validation list, so the test videos choose the best epoch; set dataset.val=LIST to choose it on others, or " in outcome.out


@pytest.mark.slow
def test_the_network_of_the_quickstart_is_tiny_by_its_recipe_and_only_there():
    count = {}
    for dataset in ("synthetic", "ucf101"):
        outcome = run_tool("flops", "model=x3d", f"dataset={dataset}", "json=true")
        count[dataset] = json.loads(outcome.out)["params"]
    assert count["synthetic"] < 1e6 < count["ucf101"]
    assert "dataset" not in (ROOT / "configs/model/x3d.yaml").read_text()


@pytest.mark.slow
def test_a_dry_run_of_the_quickstart_generates_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = plan()
    assert code == 0, err
    assert "2000 train, 400 test; generated first, under data/synthetic" in out and "125 an epoch, 500 in 4 epochs; warm-up 50 steps" in out
    assert not list(tmp_path.iterdir())


def test_an_option_that_only_the_recipe_has_can_be_set(tmp_path, monkeypatch):
    data = miniature("kinetics400", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    small = [option for option in SMALL if not option.startswith("model.size")]
    code, out, err = plan(*data, "model=r3d", *small, "schedule.milestones=[0.25,0.5]", "trainer.batch_size=2")
    assert code == 0, err
    assert option(out, "schedule.gamma") == ("0.1", "configs/experiment/base/torchvision.yaml")
    assert "recipe: experiment=r3d/kinetics400 (published" in out and "warning: the recipe's optimizer.lr=0.64 is for batches of 1536" in out
    assert "experiment-r3d" not in out  # in the name of the run folder
    assert re.search(r"schedule.milestones +\[0.25, 0.5\] +command line", out)


def test_only_a_training_can_be_tried_without_running():
    outcome = run_tool("flops", "model=x3d", "dry_run=true")
    assert outcome.code == 1 and outcome.err.strip() == "error: dry_run=true is an option of tools/train.py alone"


@pytest.mark.parametrize(
    "overrides,message",
    [
        (["optimizer.lr=-1"], "optimizer.lr"),
        pytest.param(["schedule.warmup=2"], "schedule.warmup", marks=pytest.mark.slow),
        (["trainer.batch_size=null"], "trainer.batch_size=None is not of type int"),
        (["model.weights=nowhere.pth"], "model.weights=nowhere.pth does not exist"),
        pytest.param(["dataset.num_classes=5"], "num_classes", marks=pytest.mark.slow),
        pytest.param(["dataset.make=false"], "dataset synthetic is not in", marks=pytest.mark.slow),
    ],
)
def test_a_dry_run_refuses_what_the_training_would_refuse(tmp_path, monkeypatch, overrides, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = plan(*overrides)
    assert code == 1 and message in err and err.startswith("error: ") and err.count("\n") == 1
