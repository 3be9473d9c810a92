"""Expand `~` in the values of a config."""

from __future__ import annotations

from omegaconf import DictConfig, ListConfig, OmegaConf

from atfr.utils.paths import expanded

NOT_PATHS = ("class_names",)


def expand_home(config: DictConfig | ListConfig, name: str = "") -> None:
    """Expand `~` in every value of a config that begins with it, so that all path options accept it."""
    for key in list(config) if isinstance(config, DictConfig) else range(len(config)):
        if key in NOT_PATHS or OmegaConf.is_missing(config, key) or OmegaConf.is_interpolation(config, key):
            continue
        value, option = config[key], f"{name}.{key}" if name else str(key)
        if OmegaConf.is_config(value):
            expand_home(value, option)
        elif isinstance(value, str) and value.startswith("~"):
            config[key] = expanded(value, option)
