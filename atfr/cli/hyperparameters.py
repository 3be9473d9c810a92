"""The hyperparameters by which TensorBoard compares runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from atfr.cli.command.arguments import parse
from atfr.engine.run.run_dir import NO_EFFECT, PATHS

ALWAYS = ("optimizer.lr", "trainer.batch_size", "trainer.epochs", "trainer.seed")
NO_HYPERPARAMETERS = {"dry_run", *NO_EFFECT, *PATHS}


def hyperparameters(config: DictConfig, chosen: dict[str, str], overrides: Iterable[str]) -> dict[str, str | float]:
    """Return the model, the dataset, the SGS layer, the main options of training, and every option that the command sets.

    Args:
        config: with `model.sgs` resolved.
        chosen: the file of each config group.
        overrides: the command's. Options that change no result are left out, such as `trainer.workers`.
    """
    sgs = config.model.get("sgs")
    found: dict[str, Any] = {
        "model": chosen.get("model"),
        "dataset": chosen.get("dataset"),
        "model/sgs": "off" if sgs is None else chosen.get("model/sgs"),
        "model.sgs.after": "none" if sgs is None else sgs.get("after"),
        "model.sgs.gflops": 1.0 if sgs is None else sgs.get("gflops"),
        **{key: OmegaConf.select(config, key) for key in ALWAYS},
    }
    for override in filter(None, map(parse, overrides)):
        key = override.key_or_group
        if not override.is_delete() and key not in found and key not in NO_HYPERPARAMETERS:
            found[key] = chosen[key] if key in chosen else OmegaConf.select(config, key)
    return {key: _plain(value) for key, value in found.items() if value is not None}


def _plain(value: Any) -> str | float:
    """Return a number as it is, and anything else as text: TensorBoard would show true as 1."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return value
    return "+".join(map(str, value)) if isinstance(value, (list, tuple, ListConfig)) else str(value)
