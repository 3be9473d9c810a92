"""Suggest options and choices for mistyped ones."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Iterable

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from atfr.cli.command.arguments import is_override, parse, value_text

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
GROUPS = ("dataset", "model", "model/sgs", "optimizer", "schedule", "trainer", "experiment")
DERIVED = ("model.clip", "model.clips")  # defaults of dataset.clip, where users change them
CLOSE = 0.8  # difflib's ratio


def did_you_mean(names: list[str]) -> str:
    """`; did you mean A or B?`, or nothing."""
    return f"; did you mean {' or '.join(names)}?" if names else ""


def similar(name: str, names: Iterable[str]) -> list[str]:
    """Return up to three similar names, the closest first. Names that differ only in case or separators exclude all others."""
    by_letters: dict[str, list[str]] = {}
    for other in names:
        by_letters.setdefault(_letters(other), []).append(other)
    close = [_letters(name)] if _letters(name) in by_letters else difflib.get_close_matches(_letters(name), by_letters, cutoff=CLOSE)
    return [other for letters in close for other in by_letters[letters]][:3]


def similar_options(name: str, config: DictConfig) -> list[str]:
    """Return options and config groups that `name` may mean: the same name in another group, or a similar spelling."""
    options = [*option_names(config), *(group for group in GROUPS if group.split("/")[0] in config or (group == "experiment" and "trainer" in config))]
    parent, _, last = name.replace("/", ".").rpartition(".")
    siblings = {option.replace("/", ".").rpartition(".")[2]: option for option in options if option.replace("/", ".").rpartition(".")[0] == parent}
    ends: dict[str, list[str]] = {}
    for option in options:
        ends.setdefault(option.replace("/", ".").rpartition(".")[2], []).append(option)
    same = [option for end, found in ends.items() if _letters(end) == _letters(last) for option in found]
    near = [siblings[end] for end in similar(last, siblings)] if parent else []
    anywhere = [option for end in similar(last, ends) for option in ends[end]]
    exact = [option for option in same if option in siblings.values()]
    return list(dict.fromkeys(exact or same or near or anywhere))[:3]


def full_name(name: str, config_name: str, arguments: list[str]) -> str:
    """Return the one option of a program that `name` may mean; the name itself if there is none, or more than one."""
    meant = similar_options(name, composed(config_name, arguments))
    return meant[0] if len(meant) == 1 else name


def is_argument(name: str, config: DictConfig) -> bool:
    """Return whether an option that does not exist would be an argument of a function that the user chooses, as in `model.backbone`."""
    parent = OmegaConf.select(config, name.rpartition(".")[0]) if "." in name else None
    return isinstance(parent, DictConfig) and "_partial_" in parent


def option_names(config: DictConfig, prefix: str = "") -> list[str]:
    """Return the full names of a config's options."""
    found: list[str] = []
    for key in config:
        name = f"{prefix}{key}"
        if str(key).startswith("_") or name in DERIVED:
            continue
        nested = OmegaConf.is_missing(config, key) or OmegaConf.is_interpolation(config, key) or config[key]
        found += option_names(nested, f"{name}.") if isinstance(nested, DictConfig) else [name]
    return found


def choices(group: str) -> list[str]:
    """Return the names of a group's files; for `experiment` with their subfolders."""
    folder = CONFIGS / group
    files = folder.rglob("*.yaml") if group == "experiment" else folder.glob("*.yaml")
    return sorted(name for name in (str(path.relative_to(folder).with_suffix("")) for path in files) if not name.startswith("base/"))


def composed(config_name: str, arguments: list[str]) -> DictConfig:
    """Compose a program's config with the groups that the arguments choose, without their other overrides."""
    given = [(parse(argument), argument) for argument in arguments if is_override(argument)]
    chosen = [
        argument
        for override, argument in given
        if override and override.key_or_group in GROUPS and not override.is_sweep_override() and value_text(override) in choices(override.key_or_group)
    ]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for tried in (chosen, [argument for argument in chosen if argument.startswith("dataset=")]):
            try:
                return compose(config_name, tried)
            except HydraException:  # incompatible choices, or a group that this program does not have
                continue
    return OmegaConf.create()


def _letters(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
