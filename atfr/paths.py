"""Expand `~` in paths."""

from __future__ import annotations

import os

from omegaconf import DictConfig, ListConfig, OmegaConf

NOT_PATHS = ("class_names",)


def expanded(path: str, option: str = "path") -> str:
    """Replace a leading `~` or `~user` by that home directory.

    Raises:
        ValueError: there is no such home directory; names the option.
    """
    found = os.path.expanduser(path)
    if found.startswith("~"):
        user = found.split("/")[0]
        raise ValueError(f"{option}={path}: {user} is no home directory on this machine; write ./{path} for a file or folder of that name")
    return found


def expand_home(config: DictConfig | ListConfig, name: str = "") -> None:
    """Expand `~` in every value of a config that begins with it, so that all path options treat it alike."""
    for key in list(config) if isinstance(config, DictConfig) else range(len(config)):
        if key in NOT_PATHS or OmegaConf.is_missing(config, key) or OmegaConf.is_interpolation(config, key):
            continue
        value, option = config[key], f"{name}.{key}" if name else str(key)
        if OmegaConf.is_config(value):
            expand_home(value, option)
        elif isinstance(value, str) and value.startswith("~"):
            config[key] = expanded(value, option)
