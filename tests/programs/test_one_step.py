"""Every choice in configs/ trains: one step of tools/train.py, made small, on a miniature of its dataset."""

from __future__ import annotations

import json
import math
import runpy

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from miniatures import miniature
from omegaconf import open_dict
from run_tools import ROOT
from tiers import slow_but

from atfr.data.datasets.synthetic import generate
from atfr.engine.trainer import Trainer

CONFIGS = ROOT / "configs"
SMALLEST = {"x3d": "tiny", "r2plus1d": "tiny", "resnet3d": "18", "slowfast": "4x16-R50"}
OWN = {  # what a choice says that it needs
    "custom": ["model.backbone._target_=torchvision.models.video.mc3_18"],
    "custom_sgs": ["model.backbone._target_=torchvision.models.video.mc3_18", "model.sgs.after=stem"],
}
SMALL = [
    "model.weights=null",
    "dataset.clip.crop_size=32",
    "dataset.clip.train_short_side=[32,40]",
    "dataset.clip.test_short_side=32",
    "trainer.batch_size=2",
    "trainer.max_steps=1",
    "trainer.log_every=1",
    "trainer.workers=0",
    "trainer.statistics_clips=0",
    "trainer.tensorboard_pictures=0",  # they take longer than the step; the tests of monitoring/ look at them
    "trainer.accelerator=cpu",
    "trainer.test=false",
]


def choices(group: str) -> list[str]:
    """List the choices of a group and of the groups in it."""
    return sorted(f"{group}={path.relative_to(CONFIGS / group).with_suffix('')}" for path in (CONFIGS / group).rglob("*.yaml"))


EXPERIMENTS = choices("experiment")
# A folder of experiments is a network's, and trains it.
MODELS = [choice for choice in choices("model") if "sgs/" not in choice and not (CONFIGS / "experiment" / choice.removeprefix("model=")).is_dir()]
DATASETS = [choice for choice in choices("dataset") if "clip/" not in choice]
OTHERS = [*(choice for choice in choices("model/sgs") if choice != "model/sgs=options"), *choices("optimizer"), *choices("schedule"), *choices("trainer")]

QUICK = ("dataset=videolist", "dataset=kinetics400", "model/sgs=atfr", "model/sgs=glance", "model/sgs=reference", "model/sgs=uniform", "optimizer=adamw", "schedule=step")


@pytest.fixture(scope="module")
def train():
    """`main` of tools/train.py, which takes a config instead of a command line."""
    return runpy.run_path(str(ROOT / "tools/train.py"))["main"].__wrapped__


@pytest.fixture(scope="module")
def data(tmp_path_factory, small_videos):
    """Map a dataset's config to the overrides that it needs; each dataset is written once."""
    root, found = tmp_path_factory.mktemp("miniatures"), {}

    def overrides(name: str, dwell: str | None, distractors: bool) -> list[str]:
        key = name, dwell, distractors
        if key not in found:
            folder = root / " ".join(map(str, key))
            if name == "videolist":
                made = [f"dataset.root={small_videos}", "dataset.train=train.csv", "dataset.test=test.csv"]
            elif name == "synthetic":
                generate(folder, train=2, test=1, dwell=dwell, distractors=distractors, workers=1)
                made = [f"dataset.root={folder}", "dataset.train=2", "dataset.test=1"]
            else:
                made = miniature(name, folder)[1:]  # the first one chooses it
            found[key] = made
        return found[key]

    return overrides


@pytest.mark.parametrize("choice", slow_but((*EXPERIMENTS, *MODELS, *DATASETS, *OTHERS), QUICK.__contains__))
def test_every_choice_takes_a_training_step(tmp_path, data, train, monkeypatch, choice):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        recipe = [] if choice.startswith("experiment=") else ["~experiment"]  # what is looked at is this choice alone
        config = compose("train", [choice, *recipe], return_hydra_config=True)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    HydraConfig.instance().set_config(config)
    dataset, model = (config.hydra.runtime.choices[group] for group in ("dataset", "model"))
    folder = choice.removeprefix("experiment=").split("/")[0]
    assert model == folder or not (CONFIGS / "model" / f"{folder}.yaml").exists()
    with open_dict(config):
        del config["hydra"]

    network = model.removesuffix("_sgs")
    size = [f"model.size={SMALLEST[network]}"] if network in SMALLEST else []
    frames = 16 if network in ("s3d", "custom") else 8  # the fewest that they take
    config.merge_with_dotlist([*size, *OWN.get(model, []), *data(dataset, config.dataset.get("dwell"), config.dataset.get("distractors", False)), *SMALL])
    config.merge_with_dotlist([f"dataset.clip.frames={frames}", f"trainer.output_dir={tmp_path}"])
    if config.model.sgs.preset in ("atfr", "uniform", "stride", "random") and choice != "model/sgs=atfr":
        config.model.sgs.keep_ratio = 0.5  # a budget in GFLOPs needs their table, which takes seconds

    monkeypatch.setattr(Trainer, "save", lambda self, path, **options: None)  # hundreds of megabytes each time
    train(config)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["split"], line["step"]) for line in lines] == [("train", 1), ("val", 1)]
    assert math.isfinite(lines[0]["loss"]) and lines[0]["grad_norm"] > 0 and lines[0]["lr"] >= 0
