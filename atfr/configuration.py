"""From a composed Hydra config to objects: checked key by key, built by `_target_`.

Only the programs in tools/ use this; models, data and engine take plain values.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import logging
import os
import re
import sys
import traceback
import types
import typing
from collections import abc
from pathlib import Path
from typing import Any, Callable, Union

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from atfr.data.records import VideoError
from atfr.engine.run_folder import PLACES

log = logging.getLogger(__name__)

# Keys of a group that others read, and that its own target does not take.
SHARED_KEYS = {"model": ("clip", "clips", "weights"), "dataset": ("clip", "model_size", "manifest")}
# What a config has at its top.
ROOT_KEYS = ("dataset", "model", "optimizer", "schedule", "trainer", "experiment", "dry_run", "init_from", "checkpoint", "format", "json", "num_classes", "budgets", "refresh_batch_norm")


def build(node: DictConfig, key: str, **extra: Any) -> Any:
    """Call the `_target_` of the config node at `key` with the node's values and `extra`.

    Raises:
        ValueError: in one line, for a key that the target does not take, one that it lacks or one
            of a wrong type (all with their full name), and whatever the target itself refuses.
    """
    values = OmegaConf.to_container(node, resolve=False)
    for name in _unset(values):
        raise ValueError(f"{key}.{name} is not set; add {key}.{name}=... to the command")
    kept = OmegaConf.masked_copy(node, [name for name in values if name not in SHARED_KEYS.get(key, ())])
    kept._set_parent(node._get_parent())
    _check(OmegaConf.to_container(kept, resolve=True), key, given=extra)
    try:
        return instantiate(kept, **extra, _convert_="object")
    except InstantiationException as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None


def _unset(values: dict[str, Any]) -> list[str]:
    nested = [f"{name}.{inner}" for name, value in values.items() if isinstance(value, dict) and "_target_" in value for inner in _unset(value)]
    return [name for name, value in values.items() if value == "???"] + nested


def check_root(config: DictConfig) -> None:
    """Raise ValueError for a key at the top of the config that nothing reads. A dense network's `model.sgs` becomes null."""
    unknown = [str(key) for key in config if key not in ROOT_KEYS]
    if unknown:
        raise ValueError(f"{unknown[0]} is not an option; there are {', '.join(ROOT_KEYS)}")
    if OmegaConf.select(config, "model.sgs._target_") == f"{__name__}.{nothing.__name__}":
        config.model.sgs = None  # so that a run folder has no options that mean nothing


def nothing(**options: Any) -> None:
    """What `model.sgs` makes for a dense network, whatever it says there."""


def warn_of_ignored(config: DictConfig) -> None:
    """Say in one line that the command's `model.sgs.*` are for nothing, where they are; a config composed without a command has none."""
    if not HydraConfig.initialized():
        return
    given = [override for override in HydraConfig.get().overrides.task if override.lstrip("+").startswith("model.sgs.")]
    if given and config.model.get("sgs") is None:
        name = HydraConfig.get().runtime.choices.get("model")
        log.warning("model=%s does not sample: %s ignored, and jobs of a sweep that differ only in it are one experiment", name, ", ".join(given))


def _check(values: dict[str, Any], key: str, given: typing.Collection[str] = ()) -> None:
    """Compare a node's values with the signature of its target, and those of nested targets."""
    target = _target(values["_target_"], key)
    try:
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):  # a function of somebody else's, whose hints cannot be read
        hints = {}
    parameters = inspect.signature(target).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, value in values.items():
        if name.startswith("_"):
            continue
        if name not in parameters and not takes_any:
            raise ValueError(f"{key}.{name} is not an option of {values['_target_']}; it takes {', '.join(parameters)}")
        if isinstance(value, dict) and "_target_" in value:
            _check(value, f"{key}.{name}")
        elif not _fits(value, hints.get(name, Any)):
            raise ValueError(f"{key}.{name}={value!r} is not of type {_readable(hints[name])}")
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    lacking = [n for n, p in parameters.items() if p.default is p.empty and p.kind not in variable and n not in values and n not in given]
    if lacking and not values.get("_partial_"):
        raise ValueError(f"{key}.{lacking[0]} is not set; add {key}.{lacking[0]}=... to the command")


def _target(path: str, key: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{key}._target_={path!r} cannot be imported: {error}") from error


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


def run_folder(output_dir: str | None, *, under: str = "") -> Path:
    """`trainer.output_dir`, or a folder under runs/ (and there under `under`) named after the command's overrides.

    The name is the same for the same command, so that running it again resumes; it has no date. It leaves out where
    the data lie: of a list, it has the file's name without its folder. It holds nothing that a shell or hydra would
    want quoted, and a hash where letters had to go.
    """
    if output_dir is not None:
        return Path(output_dir)
    now, sweep = HydraConfig.get(), in_sweep()
    # In a sweep any key may be what tells the jobs apart, also one that leaves the experiment as it is.
    full = ",".join(sorted(now.overrides.task if sweep else _without_places(now)))
    name = re.sub(r"[^\w.+-]+", "_", full.replace("=", "-"))[:100] or "default"
    if len(full) > 100 or re.search(r"[^\w.+=,-]", full):
        name += "-" + hashlib.sha256(full.encode()).hexdigest()[:8]
    return Path("runs", under, "sweep", name) if sweep else Path("runs", under, name)


def _without_places(now: Any) -> list[str]:
    """Return the command's overrides without those that hydra.job.config.override_dirname excludes and without folders of lists."""
    kept = []
    for override in now.overrides.task:
        key, equals, value = override.partition("=")
        if key.lstrip("+~") in now.job.config.override_dirname.exclude_keys:
            continue
        is_file = key.lstrip("+~") in PLACES and not value.startswith("[")
        kept.append(f"{key}{equals}{os.path.basename(value) if is_file else value}")
    return kept


def in_sweep() -> bool:
    """Whether this is a job of a sweep (`-m`)."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def choices() -> dict[str, str]:
    """Which file was chosen of each config group, for the checkpoint to remember."""
    return {group: choice for group, choice in HydraConfig.get().runtime.choices.items() if not group.startswith("hydra") and choice}


def as_text(error: Exception) -> str:
    """What to print of an error: one line if it is something that the user can mend, otherwise the traceback.

    ATFR_TRACEBACK=1 in the environment makes it the traceback of any.
    """
    loader = type(error) is RuntimeError and str(error).startswith("DataLoader")
    mendable = isinstance(error, (ValueError, OSError, FloatingPointError, VideoError, OmegaConfBaseException))
    if os.environ.get("ATFR_TRACEBACK") == "1" or not (mendable or loader):
        return "".join(traceback.format_exception(error)).rstrip()
    hint = "; a video may be stuck or memory short: see trainer.timeout_s and trainer.workers" if loader else ""
    return f"error: {' '.join(str(error).split())}{hint}"


def one_line_errors(main: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """End a program with exit code 1, and with one line on what its user can mend."""

    @functools.wraps(main)
    def guarded(config: DictConfig) -> None:
        try:
            main(config)
        except Exception as error:
            text, alone = as_text(error), "SUBMITIT_EXECUTOR" in os.environ
            if text.startswith("Traceback") and not alone:
                raise  # hydra prints it
            print(text, file=sys.stderr, flush=True)
            if not alone and in_sweep():
                raise  # the other jobs of a sweep still run, and hydra exits with 1 in the end
            # Submitit runs each job of a sweep alone, and would take an exception for a job that ended well.
            sys.exit(1)

    return guarded


FULL_ERROR = "HYDRA_FULL_ERROR"  # at 1 hydra raises an error instead of printing what it makes of it
NULL_CHOICE = "Config group override must be a string"  # hydra's, of GROUP=null


def program(config_name: str) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Make `main(config)` of a file beside configs/ a program of this config; what its user can mend is said in one line."""

    def decorate(main: Callable[[DictConfig], None]) -> Callable[[], None]:
        ours = False

        @functools.wraps(main)
        def composed(config: DictConfig) -> None:
            if ours:
                os.environ.pop(FULL_ERROR, None)
            main(config)

        run = hydra.main(version_base="1.3", config_path="../configs", config_name=config_name)(one_line_errors(composed))

        @functools.wraps(main)
        def start() -> None:
            nonlocal ours
            ours = os.environ.get(FULL_ERROR) != "1"
            if ours:
                os.environ[FULL_ERROR] = "1"  # until main begins: of a command that gives no config hydra prints up to 30 lines
            try:
                run()
            except Exception as error:
                if not (ours and _is_of_the_command(error)):
                    raise
                print(f"error: {_of_the_command(error)}", file=sys.stderr, flush=True)
                sys.exit(1)
            finally:
                if ours:
                    os.environ.pop(FULL_ERROR, None)

        return start

    return decorate


def _is_of_the_command(error: Exception) -> bool:
    """Whether hydra raised it over the command line, not main."""
    return isinstance(error, (HydraException, OmegaConfBaseException)) or NULL_CHOICE in str(error)


def _of_the_command(error: Exception) -> str:
    """In one line, why hydra composes no config from the command line."""
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"{group}={name} does not exist; choose one of {', '.join(error.options)}"
    text = " ".join(str(error).split("See https://")[0].split())
    if isinstance(error, OverrideParseException):
        return f"{error.override} is not understood ({text}): put a value with = , [ or spaces into quotes, twice for the shell: 'key=\"value\"'"
    if NULL_CHOICE in text:
        return "a config group takes the name of one of its files, not null: ~GROUP (such as ~experiment) chooses none"
    if "Could not override 'model/sgs'" in text:
        return "model/sgs picks the layer of a network that samples, and this model has none: take its twin, model=NAME_sgs"
    return text
