"""The training recipe that a command runs when it chooses a dataset and no experiment.

A recipe is a file of `configs/experiment/`, named NETWORK/DATASET or NETWORK/DATASET_SIZE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from atfr.cli.arguments import is_sweep
from atfr.cli.home import expand_home
from atfr.cli.suggestions import CONFIGS

SOURCE = "# Source: "
UNPUBLISHED = "not published"  # how the source of a recipe of ours begins
SHORT_NAMES = {"something_something_v2": "ssv2"}
KINETICS = ("kinetics400", "kinetics600", "mini_kinetics")


@dataclass(frozen=True)
class Recipe:
    """A file of `configs/experiment/`, without its suffix, and where its values come from."""

    name: str
    source: str  # "" for a file without a source, such as those of base/
    published: bool  # for this network on this dataset


def recipes() -> dict[str, str]:
    """Return the sources of all recipes, by name in alphabetical order."""
    paths = sorted((CONFIGS / "experiment").rglob("*.yaml"))
    sources = {path.relative_to(CONFIGS / "experiment").with_suffix("").as_posix(): _source(path) for path in paths}
    return {name: source for name, source in sources.items() if source}


def _source(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line.removeprefix(SOURCE) for line in lines if line.startswith(SOURCE)), "")


def find_recipe(*, model: str, size: str | None, dataset: str) -> Recipe | None:
    """Find the published recipe of a network on a dataset, or the nearest one.

    Args:
        model: a file of `configs/model/`; NAME and NAME_sgs have the same recipe.
        size: `model.size`.
        dataset: a file of `configs/dataset/`.

    Returns:
        None for the built-in dataset with a network that has no recipe for it, and for `videolist`: how
        long to train on videos that nobody else has is for their owner to say.
    """
    network, short = model.removesuffix("_sgs"), SHORT_NAMES.get(dataset, dataset)
    exact = _first(f"{network}/{short}_{size}", f"{network}/{short}")
    if exact is not None:
        source = _source(CONFIGS / "experiment" / f"{exact}.yaml")
        own = source.startswith(UNPUBLISHED) or (size == "tiny" and dataset != "synthetic")
        return Recipe(exact, source, published=not own)
    if dataset in ("synthetic", "videolist"):
        return None
    if dataset in KINETICS:
        nearest = _first(f"{network}/kinetics400_{size}", f"{network}/kinetics400", "base/pyslowfast")
    else:
        nearest = _first(f"finetune/{short}", f"base/pyslowfast_{short}", "base/pyslowfast")
    return None if nearest is None else Recipe(nearest, _source(CONFIGS / "experiment" / f"{nearest}.yaml"), published=False)


def _first(*names: str) -> str | None:
    return next((name for name in names if (CONFIGS / "experiment" / f"{name}.yaml").exists()), None)


@dataclass(frozen=True)
class Announcement:
    """What to print of a command's recipe: with one, before anything else; without, once it is known that the command can run."""

    lines: tuple[str, ...] = ()
    has_recipe: bool = False

    def say(self, *, has_recipe: bool) -> None:
        """Print the lines if this is their moment."""
        if self.lines and has_recipe == self.has_recipe:
            print(*self.lines, sep="\n", flush=True)


def with_recipe(config: DictConfig) -> tuple[DictConfig, Announcement]:
    """Compose the config anew with the recipe of its network and dataset, where the command chooses no experiment.

    What the command line sets wins over the recipe, and `~experiment` there means no recipe.

    Returns:
        The config, and what to say about its recipe.

    Raises:
        ValueError: the command line and the recipe do not fit together.
    """
    hydra = HydraConfig.get()
    given = list(hydra.overrides.task)
    if is_given("experiment", given):
        return config, Announcement()
    chosen = {group: hydra.runtime.choices[group] for group in ("model", "dataset")}
    recipe = find_recipe(size=config.model.get("size"), **chosen)
    if recipe is None:
        nearest = "" if chosen["dataset"] == "synthetic" else "; experiment=base/pyslowfast is the nearest"
        return config, Announcement((f"recipe: none for {chosen['model']} on {chosen['dataset']}{nearest}; {_summary(config)}",))
    # The network and the dataset once more, since the recipe's file names its own.
    overrides = [f"experiment={recipe.name}", *(f"{group}={choice}" for group, choice in chosen.items()), *given]
    try:
        composed = compose(hydra.job.config_name, overrides, return_hydra_config=True)
    except HydraException as error:
        raise ValueError(f"experiment={recipe.name}: {' '.join(str(error).split())}") from error
    expand_home(composed)
    _remember(composed.hydra.runtime.choices)
    with open_dict(composed):
        del composed["hydra"]
    if composed.get("init_from") is not None and not is_given("model.weights", given):
        composed.model.weights = None  # the command says what to start from
    return composed, Announcement(tuple(_lines(composed, recipe, chosen, given)), has_recipe=True)


def with_experiment(arguments: list[str]) -> list[str] | None:
    """Add the recipe's experiment to a command that hydra cannot compose without it, such as one that sets an option of its schedule.

    Returns:
        None where the command has a recipe of its own, is a sweep, or there is none.
    """
    if is_given("experiment", arguments) or is_sweep(arguments):
        return None
    given = {key: value for key, _, value in (argument.partition("=") for argument in arguments)}
    chosen = {group: given.get(group, default) for group, default in (("model", "x3d_sgs"), ("dataset", "synthetic"))}
    recipe = find_recipe(size=given.get("model.size"), **chosen)
    return None if recipe is None else [*arguments, f"experiment={recipe.name}", *(f"{group}={choice}" for group, choice in chosen.items() if group not in given)]


def is_given(key: str, overrides: Sequence[str]) -> bool:
    """Return whether a command's overrides set, add or delete this very key."""
    return any(override.lstrip("+~").partition("=")[0] == key for override in overrides)


def require_weights(config: DictConfig) -> None:
    """Raise ValueError where a recipe starts from pretrained weights and the command does not say which."""
    weights = config.model.get("weights")
    if weights is None or is_given("model.weights", HydraConfig.get().overrides.task) or Path(weights).expanduser().exists():
        return
    experiment = HydraConfig.get().runtime.choices["experiment"]
    raise ValueError(f"experiment={experiment} starts from pretrained weights: add model.weights=FILE, or model.weights=null to train from scratch")


def _remember(choices: DictConfig) -> None:
    """Put the choices of the recipe into HydraConfig: a checkpoint records them."""
    runtime = HydraConfig.get().runtime
    OmegaConf.set_readonly(runtime, False)
    runtime.choices = choices
    OmegaConf.set_readonly(runtime, True)


def _lines(config: DictConfig, recipe: Recipe, chosen: dict[str, str], given: Sequence[str]) -> list[str]:
    model, dataset = chosen["model"], chosen["dataset"]
    if dataset == "synthetic":
        what = f"for the built-in videos, model.size={config.model.size}"
    elif recipe.published:
        what = f"published: {recipe.source}"
    else:
        what = f"the nearest, since none is published for {model} {config.model.get('size') or ''} on {dataset}".replace("  ", " ")
    lines = [f"recipe: experiment={recipe.name} ({what}); {_summary(config)}"]
    batch = _batch_of(recipe)
    if batch is not None and config.trainer.batch_size != batch and not is_given("optimizer.lr", given):
        scaled = config.optimizer.lr * config.trainer.batch_size / batch
        lines.append(
            f"warning: the recipe's optimizer.lr={config.optimizer.lr:g} is for batches of {batch}:"
            f" optimizer.lr={scaled:.3g} goes with trainer.batch_size={config.trainer.batch_size}"
        )
    return lines


def _summary(config: DictConfig) -> str:
    trainer = config.trainer
    return f"{trainer.epochs} epochs, batches of {trainer.batch_size}, optimizer.lr={config.optimizer.lr:g}"


def _batch_of(recipe: Recipe) -> int | None:
    """The batch size that the recipe alone sets; None if it sets none."""
    config = compose("train", [f"experiment={recipe.name}"])
    default = OmegaConf.load(CONFIGS / "trainer" / "default.yaml").batch_size
    return None if config.trainer.batch_size == default else config.trainer.batch_size
