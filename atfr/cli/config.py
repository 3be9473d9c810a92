"""Build objects from a composed Hydra config, and check every key against the signature of its `_target_`.

Only the programs in tools/ use this; models, data and engine take plain values.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import os
import sys
import types
import typing
from collections import abc
from typing import Any, Callable, Union

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from atfr.cli.command.arguments import quote_where_needed, refuse_flags
from atfr.cli.command.errors import JobLog, explain, is_of_the_command, one_line_errors, quiet_at_closed_pipe, unknown_option
from atfr.cli.command.home import expand_home
from atfr.cli.command.suggestions import GROUPS, did_you_mean, full_name, similar
from atfr.models.sgs.config import PRESETS, SGSConfig

log = logging.getLogger(__name__)

FULL_ERROR = "HYDRA_FULL_ERROR"  # 1: hydra raises errors instead of printing them

# Keys of a group that other code reads and the group's target does not take.
SHARED_KEYS = {"model": ("clip", "clips", "weights"), "dataset": ("clip", "manifest")}
SGS_CONFIG = f"{SGSConfig.__module__}.{SGSConfig.__qualname__}"
# What a config has at its top.
ROOT_KEYS = ("dataset", "model", "optimizer", "schedule", "trainer", "experiment", "init_from", "checkpoint", "format", "json", "num_classes", "budgets", "refresh_batch_norm")


def build(node: DictConfig, key: str, **extra: Any) -> Any:
    """Call the `_target_` of the config node at `key` with the node's values and `extra`. The key of a whole config is "".

    Raises:
        ValueError: a key is unknown, missing or of a wrong type (the message has its full name), or the target
            raises it.
    """
    if key == "model":
        node = with_resolved_sgs(node)
    values = OmegaConf.to_container(node, resolve=False)
    for name in _unset(values):
        raise ValueError(f"{_full(key, name)} is not set; add {_full(key, name)}=... to the command")
    kept = OmegaConf.masked_copy(node, [name for name in values if name not in SHARED_KEYS.get(key, ())])
    kept._set_parent(node._get_parent())
    _check(OmegaConf.to_container(kept, resolve=True), key, given=extra)
    try:
        return instantiate(kept, **extra, _convert_="object")
    except InstantiationException as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None


def _full(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _unset(values: dict[str, Any]) -> list[str]:
    nested = [f"{name}.{inner}" for name, value in values.items() if isinstance(value, dict) and "_target_" in value for inner in _unset(value)]
    return [name for name, value in values.items() if value == "???"] + nested


def take_dry_run(config: DictConfig) -> bool:
    """Remove `dry_run` from a config, because it is not part of the experiment, and return its value."""
    with open_dict(config):
        value = config.pop("dry_run", False)
    if not isinstance(value, bool):
        raise ValueError(f"dry_run={value} must be true or false")
    return value


def check_size(config: DictConfig) -> None:
    """Raise ValueError for a `model.size` that the network does not have."""
    sizes = OmegaConf.select(config, "model.clips")
    size = None if sizes is None else str(config.model.size)
    if size is not None and size not in sizes:
        meant = did_you_mean([f"model.size={other}" for other in similar(size, list(sizes))])
        raise ValueError(f"model.size={size} does not exist{meant or ';'} there are {', '.join(map(str, sizes))}")


def check_root(config: DictConfig) -> None:
    """Raise ValueError for a key at the top of the config that nothing reads or that has no value, and resolve `model.sgs`."""
    if take_dry_run(config):
        raise ValueError("dry_run=true is an option of tools/train.py alone")
    unknown = [str(key) for key in config if key not in ROOT_KEYS]
    if unknown:
        raise ValueError(unknown_option(unknown[0], OmegaConf.masked_copy(config, [key for key in config if key in ROOT_KEYS])))
    unset = [str(key) for key in config if OmegaConf.is_missing(config, key)]
    if unset:
        raise ValueError(f"{unset[0]} is not set; add {unset[0]}=... to the command")
    if "model" in config:
        config.model = with_resolved_sgs(config.model)


def with_resolved_sgs(model: DictConfig) -> DictConfig:
    """Return `model` with the options of its preset in `sgs`, changed as given there, and without those that have no effect.

    The preset `off` gives null.

    Raises:
        ValueError: an option has a wrong type or value, or has no effect next to the others.
    """
    if model.get("sgs") is None or "preset" not in model.sgs:
        return model
    given = OmegaConf.to_container(model.sgs, resolve=True)
    preset = given.pop("preset")
    if preset == "???":
        raise ValueError(f"model.sgs.preset is not set; choose one with model/sgs={', model/sgs='.join(PRESETS)}")
    given = {name: value for name, value in given.items() if value is not None}
    resolved = model.copy()
    resolved._set_parent(model._get_parent())
    options = None
    if preset != "off":
        _check({"_target_": SGS_CONFIG, **given}, "model.sgs")
        options = {"_target_": SGS_CONFIG, **SGSConfig.from_preset(preset, **given).used_options()}
    OmegaConf.update(resolved, "sgs", options if options is None else OmegaConf.create(options), merge=False)
    return resolved


def warn_of_ignored(config: DictConfig) -> None:
    """Warn in one line if the command sets `model.sgs.*` for a dense network, which ignores it."""
    if not HydraConfig.initialized():
        return
    given = [override for override in HydraConfig.get().overrides.task if override.lstrip("+").startswith("model.sgs.")]
    if given and config.model.get("sgs") is None:
        name = HydraConfig.get().runtime.choices.get("model")
        log.warning("model=%s does not sample: %s ignored, and jobs of a sweep that differ only in it are duplicates", name, ", ".join(given))


def _check(values: dict[str, Any], key: str, given: typing.Collection[str] = ()) -> None:
    """Raise ValueError unless the values of a node fit the signature of its target, and those of nested targets theirs."""
    target = _target(values["_target_"], key)
    try:
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):  # a third-party function with unreadable hints
        hints = {}
    parameters = inspect.signature(target).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, value in values.items():
        if name.startswith("_"):
            continue
        if name not in parameters and not takes_any:
            meant = did_you_mean([_full(key, other) for other in similar(name, parameters)])
            raise ValueError(f"{_full(key, name)} is not an option of {values['_target_']}{meant or ';'} it takes {', '.join(parameters)}")
        if isinstance(value, dict) and "_target_" in value:
            _check(value, _full(key, name))
        elif not _fits(value, hints.get(name, Any)):
            group = _full(key, name).replace(".", "/")
            way_out = f"; a file of that group is chosen with {group}={value}" if group in GROUPS else ""
            raise ValueError(f"{_full(key, name)}={value!r} is not of type {_readable(hints[name])}{way_out}")
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    lacking = [n for n, p in parameters.items() if p.default is p.empty and p.kind not in variable and n not in values and n not in given]
    if lacking and not values.get("_partial_"):
        raise ValueError(f"{_full(key, lacking[0])} is not set; add {_full(key, lacking[0])}=... to the command")


def _target(path: str, key: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        unknown = isinstance(error, ModuleNotFoundError) and error.name == path.partition(".")[0]
        way_out = "; if it is yours, put PYTHONPATH=FOLDER in front of the command" if unknown else ""
        raise ValueError(f"{key}._target_={path!r} cannot be imported: {error}{way_out}") from error


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in (list, abc.Sequence):
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if isinstance(hint, type):
        return isinstance(value, hint)
    return True


def _readable(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "").replace("NoneType", "null").replace("None", "null")


def choices() -> dict[str, str]:
    """Return the chosen file of each config group, to be recorded in the checkpoint."""
    return {group: choice for group, choice in HydraConfig.get().runtime.choices.items() if not group.startswith("hydra") and choice}


def program(
    config_name: str,
    arguments: Callable[[list[str]], list[str]] = list,
    otherwise: Callable[[list[str]], list[str] | None] = lambda given: None,
) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Decorate `main(config)` of a file in tools/ or scripts/ as a program that composes this config.

    Errors that the user can fix are printed in one line.

    Args:
        arguments: changes the command line before hydra reads it.
        otherwise: returns another command line to try if hydra cannot compose the first, or None.
    """

    def decorate(main: Callable[[DictConfig], None]) -> Callable[[], None]:
        ours, jobs = False, JobLog()

        @functools.wraps(main)
        def composed(config: DictConfig) -> None:
            if ours:
                os.environ.pop(FULL_ERROR, None)
            expand_home(config)
            check_size(config)
            main(config)

        run = hydra.main(version_base="1.3", config_path="../configs", config_name=config_name)(one_line_errors(composed, jobs))

        @functools.wraps(main)
        def start() -> None:
            nonlocal ours
            sys.argv[1:] = arguments(quote_where_needed(sys.argv[1:]))
            ours = os.environ.get(FULL_ERROR) != "1"
            if ours:
                os.environ[FULL_ERROR] = "1"  # until main begins, because hydra prints up to 30 lines if it cannot compose a config
            try:
                refuse_flags(sys.argv[1:], lambda name: full_name(name, config_name, sys.argv[1:]))
                with quiet_at_closed_pipe():
                    try:
                        run()
                    except Exception as error:
                        again = otherwise(sys.argv[1:]) if ours and is_of_the_command(error) else None
                        if again is None:
                            raise
                        GlobalHydra.instance().clear()
                        sys.argv[1:] = again
                        run()
            except Exception as error:
                if not (ours and is_of_the_command(error)):
                    raise
                print(f"error: {explain(error, config_name, sys.argv[1:])}", file=sys.stderr, flush=True)
                sys.exit(1)
            finally:
                if ours:
                    os.environ.pop(FULL_ERROR, None)
            jobs.end()

        return start

    return decorate
