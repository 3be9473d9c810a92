"""Configs of configs/, composed as a program composes them."""

from __future__ import annotations

import copy
import functools

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from run_tools import ROOT

CONFIGS = ROOT / "configs"


def composed(*overrides: str, name: str = "train") -> DictConfig:
    """Return a config that the caller may change: a copy, because hydra takes much longer to compose one."""
    return copy.deepcopy(_composed(name, overrides))


@functools.cache
def _composed(name: str, overrides: tuple[str, ...]) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(name, list(overrides))
