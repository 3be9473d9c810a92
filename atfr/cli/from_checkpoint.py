"""Config and network of a checkpoint, for the programs that start from one.

The config is the one that the checkpoint was trained with, changed by the overrides of the command line.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from atfr.cli import builders
from atfr.cli.command.arguments import is_override, parse, value_text
from atfr.cli.command.run_name import run_folder
from atfr.data.types import VideoSource
from atfr.engine.distributed.comm import DistInfo
from atfr.engine.run import checkpoint
from atfr.models.video_net import VideoNet
from atfr.utils.paths import expanded

BUDGETS = ("model.sgs.gflops", "model.sgs.keep_ratio", "model.sgs.gflops_range")
OF_THE_COMMAND = ("checkpoint", "format", "budgets", "refresh_batch_norm")  # keys of the command, which are not part of the checkpoint's config

read = functools.cache(checkpoint.load)  # read twice: to compose the config, and for the weights


def results_folder(path: Path, output_dir: str | None) -> Path:
    """Return the folder for results: trainer.output_dir, or the run folder; in a sweep, a folder in it for each job."""
    if output_dir is None and path.parent.name != "checkpoints":
        raise ValueError(f"checkpoint {path} is in no run folder's checkpoints/; add trainer.output_dir=... for the results")
    folder = Path(output_dir) if output_dir is not None else path.parent.parent
    return folder / run_folder(None) if HydraConfig.get().mode == RunMode.MULTIRUN else folder


def with_overrides(state: dict[str, Any], composed: DictConfig, *, trains: bool = False) -> DictConfig:
    """Return the checkpoint's config with this command's overrides, whose values come from the composed config.

    Args:
        trains: the program reads the training list, which a test does not need.
    """
    config = OmegaConf.create(state["config"])
    config.trainer.devices, config.trainer.accelerator = None, "auto"
    now = HydraConfig.get().runtime.choices
    given = given_overrides(HydraConfig.get().overrides.task)
    for override in sorted(given, key=lambda override: "." in override):  # whole groups before single keys
        if override not in OF_THE_COMMAND and (override not in now or now[override] != state["choices"].get(override)):
            with_sgs = override == "model" and now[override] == f"{state['choices'].get(override)}_sgs"  # the network stays as it was trained
            key = "model.sgs" if with_sgs else override.replace("/", ".")
            OmegaConf.update(config, key, OmegaConf.select(composed, key), merge=False, force_add=True)
    if "make" in config.dataset and "dataset.make" not in given:
        config.dataset.make = None  # the training may have run on another machine
    if composed.model.get("sgs") is None:  # the loop above may have set single keys of it
        config.model.sgs = None
    # The checkpoint has the class names, so the test needs no training list.
    if isinstance(config.dataset.get("train"), str) and not trains:
        config.dataset.train = None
    if "class_names" in config.dataset and config.dataset.class_names is None:
        config.dataset.class_names = state["class_names"]
    return config


def given_overrides(arguments: list[str]) -> list[str]:
    """Return the keys that a command line overrides, including groups.

    Raises:
        ValueError: it deletes a key, chooses an experiment, names pretrained weights or sets a budget. A program that
            starts from a checkpoint cannot use these.
    """
    program, keys = f"tools/{Path(sys.argv[0]).name}", []
    for override in OverridesParser.create().parse_overrides([a for a in arguments if is_override(a)]):
        if override.is_delete() or override.key_or_group == "experiment":
            raise ValueError(f"{program} does not take {override.input_line}: change the checkpoint's config key by key")
        if override.key_or_group in ("model.weights", "init_from"):
            raise ValueError(f"{program} does not take {override.input_line}: the weights are those of checkpoint=...")
        if override.key_or_group in BUDGETS:
            raise ValueError(f"{program} does not take {override.input_line}: a budget is calibrated on training clips; use python tools/calibrate.py checkpoint=RUN budgets=[...]")
        keys.append(override.key_or_group)
    return keys


def like_the_checkpoint(arguments: list[str]) -> list[str]:
    """Return the arguments with the config groups of the checkpoint added, for hydra to compose from."""
    named = [override for override in map(parse, arguments) if override is not None and override.key_or_group == "checkpoint"]
    try:
        chosen = read(checkpoint_file(value_text(named[-1])))["choices"] if named and not named[-1].is_sweep_override() else {}
        given = {*given_overrides(arguments), "experiment"}
    except (ValueError, OSError, HydraException):
        return arguments  # main or hydra reports the error
    # A group inside a given one, such as model/sgs in another model, does not come from the checkpoint either.
    groups = [f"{group}={choice}" for group, choice in chosen.items() if not {group, group.split("/")[0]} & given]
    first = next((i for i, argument in enumerate(arguments) if is_override(argument)), len(arguments))
    return [*arguments[:first], *groups, *arguments[first:]]


def checkpoint_file(value: str) -> Path:
    """Return the file that `checkpoint=` names: a checkpoint, or the best one of a run folder."""
    return builders.weights_file(expanded(str(value), "checkpoint"), "checkpoint")


def test_videos(config: DictConfig, state: dict[str, Any], path: Path, dist_info: DistInfo) -> VideoSource:
    """Return the dataset's videos.

    Raises:
        ValueError: there are no test videos, or the dataset has other classes than the checkpoint.
    """
    source = builders.load_source(config, dist_info, make=False)
    builders.require_videos(source, "test")
    require_classes(source, state, path)
    return source


def require_classes(source: VideoSource, state: dict[str, Any], path: Path) -> None:
    """Raise ValueError if the dataset has other classes than the checkpoint."""
    if list(source.class_names) != state["class_names"]:
        raise ValueError(
            f"checkpoint {path} was trained for {len(state['class_names'])} classes ({', '.join(state['class_names'][:3])}, ...),"
            f" dataset {source.name} has {len(source.class_names)} ({', '.join(source.class_names[:3])}, ...)"
        )


def trained_model(config: DictConfig, state: dict[str, Any], path: Path, dist_info: DistInfo) -> VideoNet:
    """Return the checkpoint's network with its weights.

    Raises:
        ValueError: the weights belong to another network.
    """
    model = builders.build_model(config, num_classes=len(state["class_names"]), dist_info=dist_info)
    checkpoint.load_weights(model, state["model"], path)
    return model
