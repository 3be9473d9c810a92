"""The recipes of configs/experiment: their table, and what all of them keep to."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from miniatures import miniature
from omegaconf import OmegaConf
from run_tools import ROOT, run_script, run_tool
from tiers import slow_but

from atfr.cli.recipe import recipes

RECIPES = recipes()


def composed(*overrides):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("train", list(overrides), return_hydra_config=True)
    model = config.hydra.runtime.choices["model"]
    plain = OmegaConf.to_container(config, resolve=False)
    del plain["hydra"]
    return plain, model


def test_the_table_is_made_from_the_files_as_they_are(tmp_path):
    outcome = run_script("scripts/recipes.py", "--output", str(tmp_path / "recipes.md"))
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "recipes.md").read_text() == (ROOT / "docs/recipes.md").read_text(), "run python scripts/recipes.py --output docs/recipes.md"


def test_every_network_has_a_recipe_for_kinetics_and_so_does_the_papers_for_mini_kinetics():
    networks = {path.stem for path in (ROOT / "configs/model").glob("*.yaml") if not path.stem.endswith("_sgs")} - {"custom", "i3d_inception"}  # which comes trained
    assert {f"{network}/kinetics400" for network in networks} | {"resnet3d/mini_kinetics"} <= set(RECIPES)
    assert {"finetune/ucf101", "finetune/hmdb51"} <= set(RECIPES)


@pytest.mark.parametrize("name", slow_but(RECIPES, ("x3d/kinetics400", "slowfast/kinetics400", "finetune/ucf101", "resnet3d/mini_kinetics").__contains__))
def test_a_recipe_is_the_same_with_and_without_sgs_and_its_shares_are_whole_epochs(name):
    dense, model = composed(f"experiment={name}", *(["model=x3d"] if name.startswith("finetune/") else []))
    sampled, _ = composed(f"experiment={name}", f"model={model}_sgs")
    assert dense["model"].pop("sgs")["preset"] == "off" and sampled["model"].pop("sgs")["preset"] == "atfr"
    assert sampled == dense
    epochs, schedule = dense["trainer"]["epochs"], dense["schedule"]
    for share in (schedule["warmup"], *schedule.get("milestones", ())):
        assert share * epochs == pytest.approx(round(share * epochs), abs=1e-3)


def test_the_papers_layer_can_be_chosen_with_a_recipe():
    config, _ = composed("experiment=resnet3d/mini_kinetics", "model=resnet3d_sgs", "model/sgs=reference")
    assert config["model"]["sgs"]["preset"] == "reference" and config["optimizer"]["lr"] == 0.1 and config["dataset"]["name"] == "mini_kinetics"


def test_fine_tuning_without_weights_is_refused_in_one_line(tmp_path):
    overrides = miniature("ucf101", tmp_path / "data")[1:]
    outcome = run_tool("train", "experiment=finetune/ucf101", *overrides, "trainer.accelerator=cpu", f"trainer.output_dir={tmp_path / 'run'}")
    assert outcome.code == 1 and outcome.err.startswith("error: experiment=finetune/ucf101 starts from pretrained weights: add model.weights=pytorchvideo:x3d_s, or") and outcome.err.count("\n") == 1
