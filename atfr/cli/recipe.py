"""Find the training recipe for a command that chooses a dataset and no experiment.

A recipe is a file of `configs/experiment/`, named NETWORK/DATASET or NETWORK/DATASET_SIZE. Its comments give the source of its
values (`# Source: ...`) and, if they were not published for all sizes of the network, the sizes (`# Sizes: ...`).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from atfr.cli.builders import network_name
from atfr.cli.command.arguments import is_sweep, parse, value_text
from atfr.cli.command.home import expand_home
from atfr.cli.command.suggestions import CONFIGS
from atfr.models.pretrained.published import names_for

EXPERIMENTS = CONFIGS / "experiment"
SOURCE, SIZES = "# Source: ", "# Sizes: "
UNPUBLISHED = "not published"  # the start of the source of our own recipes
SHORT_NAMES = {"something_something_v2": "ssv2"}
KINETICS = ("kinetics400", "kinetics600", "mini_kinetics")
ADDED = "ATFR_RECIPE"  # environment variable: the experiment that `with_experiment` added to the command line


@dataclass(frozen=True)
class Recipe:
    """A file of `configs/experiment/`, without its suffix, and the source of its values."""

    name: str
    source: str  # "" if the file has none, as in base/
    published: bool  # for this network, of this size, on this dataset


@dataclass(frozen=True)
class Announcement:
    """Lines to print first, and lines to print once the command is known to run."""

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


def say(lines: Sequence[str]) -> None:
    """Print lines, if there are any."""
    if lines:
        print(*lines, sep="\n", flush=True)


def recipes() -> dict[str, str]:
    """Return the sources of all recipes, by name in alphabetical order."""
    names = sorted(path.relative_to(EXPERIMENTS).with_suffix("").as_posix() for path in EXPERIMENTS.rglob("*.yaml"))
    sources = {name: _comment(name, SOURCE) for name in names}
    return {name: source for name, source in sources.items() if source}


def _comment(name: str, begin: str) -> str:
    lines = (EXPERIMENTS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return next((line.removeprefix(begin) for line in lines if line.startswith(begin)), "")


def find_recipe(*, model: str, size: str | None, dataset: str) -> Recipe | None:
    """Find the published recipe of a network on a dataset, or the nearest one.

    Args:
        model: a file of `configs/model/`; NAME and NAME_sgs have the same recipe.
        size: `model.size`.
        dataset: a file of `configs/dataset/`.

    Returns:
        None for the built-in dataset if the network has no recipe for it, and for `videolist`, because the number of
        epochs depends on the user's videos.
    """
    network, short = model.removesuffix("_sgs"), SHORT_NAMES.get(dataset, dataset)
    exact = _first(f"{network}/{short}_{size}", f"{network}/{short}")
    if exact is not None:
        source, sizes = _comment(exact, SOURCE), _comment(exact, SIZES)
        published = not source.startswith(UNPUBLISHED) and (not sizes or str(size) in sizes.split(", "))
        return Recipe(exact, source, published)
    if dataset in ("synthetic", "videolist"):
        return None
    if dataset in KINETICS:
        nearest = _first(f"{network}/kinetics400_{size}", f"{network}/kinetics400", "base/pyslowfast")
    else:
        nearest = _first(f"finetune/{short}", f"base/pyslowfast_{short}", "base/pyslowfast")
    return None if nearest is None else Recipe(nearest, _comment(nearest, SOURCE), published=False)


def _first(*names: str) -> str | None:
    return next((name for name in names if (EXPERIMENTS / f"{name}.yaml").exists()), None)


def with_recipe(config: DictConfig) -> tuple[DictConfig, Announcement]:
    """Compose the config again with the recipe of its network and dataset, unless the command chooses an experiment.

    The command line wins over the recipe: a single option, or a whole group such as `optimizer=adamw`.
    `~experiment` means no recipe.

    Returns:
        The config, and the lines to print about its recipe.

    Raises:
        ValueError: the command line and the recipe do not fit together.
    """
    hydra = HydraConfig.get()
    given = _own_overrides(hydra.overrides.task)
    if is_given("experiment", given):
        return config, Announcement()
    chosen = {group: hydra.runtime.choices[group] for group in ("model", "dataset")}
    recipe, note = _startable(find_recipe(size=config.model.get("size"), **chosen), config, chosen["model"], given)
    if recipe is None:
        nearest = "" if chosen["dataset"] == "synthetic" else " (add experiment=base/pyslowfast for a published one)"
        line = f"recipe: none for {chosen['model']} on {chosen['dataset']}{nearest}; the defaults of configs/ are used: {_summary(config)}"
        return config, Announcement(after=(line,))
    # Repeat the network and the dataset, because the recipe's file chooses its own.
    overrides = [f"experiment={recipe.name}", *(f"{group}={choice}" for group, choice in chosen.items()), *given]
    try:
        composed = compose(hydra.job.config_name, overrides, return_hydra_config=True)
    except HydraException as error:
        raise ValueError(f"experiment={recipe.name}: {' '.join(str(error).split())}") from error
    _remember(composed.hydra.runtime.choices, given)
    with open_dict(composed):
        del composed["hydra"]
        for group in ("optimizer", "schedule"):
            if is_given(group, given) and ADDED not in os.environ:
                composed[group] = config[group]  # as it is without the recipe, whose values are of another choice
    expand_home(composed)
    if composed.get("init_from") is not None and not is_given("model.weights", given):
        composed.model.weights = None  # init_from replaces the recipe's weights
    return composed, Announcement(before=(*_lines(composed, recipe, chosen, given), *note))


def _startable(recipe: Recipe | None, config: DictConfig, model: str, given: Sequence[str]) -> tuple[Recipe | None, tuple[str, ...]]:
    """Replace a recipe that needs pretrained weights, if there are none, by the network's recipe from scratch; return it and lines to print."""
    if recipe is None:
        return None, ()
    weights = _alone(recipe).model.get("weights")
    named = config.model.get("weights") if is_given("model.weights", given) else config.get("init_from")
    if weights is None or named is not None or (Path(weights).exists() and not is_given("model.weights", given)):
        return recipe, ()
    scratch = find_recipe(model=model, size=config.model.get("size"), dataset="kinetics400")
    line = f"without pretrained weights this trains from scratch; with {_weights_for(config)} it runs experiment={recipe.name}, which starts from them"
    return (None, ()) if scratch is None else (replace(scratch, published=False), (line,))


def with_experiment(arguments: list[str]) -> list[str] | None:
    """Add the recipe's experiment to a command that sets an option which only exists with the recipe, such as one of its schedule.

    Returns:
        None if the command chooses an experiment, is a sweep, or has no recipe.
    """
    overrides = {override.key_or_group: override for override in map(parse, arguments) if override is not None}
    if "experiment" in overrides or is_sweep(arguments):
        return None
    defaults = {group: name for entry in OmegaConf.load(CONFIGS / "train.yaml").defaults if entry != "_self_" for group, name in entry.items()}
    chosen = {group: value_text(overrides[group]) if group in overrides else defaults[group] for group in ("model", "dataset")}
    size = value_text(overrides["model.size"]) if "model.size" in overrides else _default_size(chosen["model"])
    recipe = find_recipe(size=size, **chosen)
    if recipe is None:
        return None
    os.environ[ADDED] = recipe.name
    return [*arguments, f"experiment={recipe.name}", *(f"{group}={choice}" for group, choice in chosen.items() if group not in overrides)]


def _default_size(model: str) -> str | None:
    path = CONFIGS / "model" / f"{model.removesuffix('_sgs')}.yaml"
    return OmegaConf.load(path).get("size") if path.exists() else None


def _own_overrides(overrides: Sequence[str]) -> list[str]:
    """Return a command's overrides without the experiment that `with_experiment` added."""
    return [override for override in overrides if override != f"experiment={os.environ.get(ADDED)}"]


def is_given(key: str, overrides: Sequence[str]) -> bool:
    """Return whether a command's overrides set, add or delete this key."""
    return any(override.lstrip("+~").partition("=")[0] == key for override in overrides)


def require_weights(config: DictConfig) -> None:
    """Raise ValueError if the recipe needs pretrained weights and the command gives none."""
    weights = config.model.get("weights")
    if weights is None or is_given("model.weights", HydraConfig.get().overrides.task) or Path(weights).exists():
        return
    experiment = HydraConfig.get().runtime.choices["experiment"]
    raise ValueError(f"experiment={experiment} starts from pretrained weights: add {_weights_for(config)}, or model.weights=null to train from scratch")


def _weights_for(config: DictConfig) -> str:
    """Return the option that gives the network pretrained weights: published ones, if there are any."""
    return f"model.weights={(names_for(network_name(config.model)) or ['FILE'])[0]}"


def _remember(choices: DictConfig, overrides: list[str]) -> None:
    """Write the recipe's choices, which a checkpoint records, and the command's own overrides into HydraConfig."""
    hydra = HydraConfig.get()
    for node, key, value in ((hydra.runtime, "choices", choices), (hydra.overrides, "task", overrides)):
        OmegaConf.set_readonly(node, False)
        node[key] = value
        OmegaConf.set_readonly(node, True)


def _lines(config: DictConfig, recipe: Recipe, chosen: dict[str, str], given: Sequence[str]) -> tuple[str, ...]:
    model, dataset, size = chosen["model"], chosen["dataset"], config.model.get("size")
    if dataset == "synthetic":
        what = f"for the built-in videos, model.size={size}"
    elif recipe.published:
        what = f"published: {recipe.source}"
    else:
        what = f"the nearest, since none is published for {' '.join(filter(None, (model, size)))} on {dataset}"
    changed = [group for group in ("optimizer", "schedule") if is_given(group, given)]
    without = f" without its {' and '.join(changed)}" if changed else ""
    lines = [f"recipe: experiment={recipe.name} ({what}){without}; {_summary(config)}"]
    batch, own = _alone(recipe).trainer.batch_size, config.trainer.batch_size
    rate = config.optimizer.lr
    if batch != own and isinstance(own, int) and isinstance(rate, float) and not (is_given("optimizer.lr", given) or is_given("optimizer", given)):
        scaled = f"optimizer.lr={rate * own / batch:.3g} goes with trainer.batch_size={own}"
        lines.append(f"warning: the recipe's optimizer.lr={rate:g} is for batches of {batch}: {scaled}")
    return tuple(lines)


def _summary(config: DictConfig) -> str:
    def shown(value: Any) -> str:
        return f"{value:g}" if isinstance(value, float) else str(value)

    return f"{config.trainer.epochs} epochs, batches of {config.trainer.batch_size}, optimizer.lr={shown(config.optimizer.lr)}"


@functools.cache
def _alone(recipe: Recipe) -> DictConfig:
    """Compose the recipe without the overrides of the command; the result is only read."""
    return compose("train", [f"experiment={recipe.name}"])
