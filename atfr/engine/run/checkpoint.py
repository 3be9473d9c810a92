"""Checkpoints: written whole or not at all, read without running code from the file."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from atfr.utils.atomic_io import sync_folder

log = logging.getLogger(__name__)

REQUIRED = ("model", "config", "choices", "class_names")


def save(state: dict[str, Any], path: Path, *, keep: int = 1) -> None:
    """Write `state` so that a kill or a full disk at any moment leaves an existing file as it was.

    With `keep` above 1 that file stays as well, named as `earlier` says, and so on up to `keep` files.

    Raises:
        OSError: the file could not be written; the one line says what is still there.
        TypeError: `state` has a value that `load` would refuse to read; names it.
    """
    state = plain(state)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            _shift(path, keep)
        os.replace(partial, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        partial.unlink(missing_ok=True)
        kept = "the one before it is intact" if path.exists() else "there was none before it"
        cause = _first_os_error(error)
        reason = cause.strerror if cause else str(error).splitlines()[0]
        raise OSError(f"checkpoint {path} could not be written ({reason}); {kept}: make room and run the same command again") from error


def plain(value: Any, *, tensor: Callable[[Tensor], Tensor] = lambda tensor: tensor, name: str = "state") -> Any:
    """Return `value` made of what a checkpoint may hold: Python's own types, tensors and torch's constants.

    Args:
        tensor: is applied to each tensor, also to those that are made of numpy arrays.
        name: of `value`, for the error.

    Raises:
        TypeError: a value of another type; names its place.
    """
    if isinstance(value, Tensor):
        return tensor(value)
    if isinstance(value, np.ndarray):
        return tensor(torch.tensor(value)) if value.dtype.kind in "biufc" else plain(value.tolist(), name=name)
    if isinstance(value, np.generic):
        return plain(value.item(), name=name)
    if isinstance(value, Mapping):
        return {plain(key, name=name): plain(member, tensor=tensor, name=f"{name}.{key}") for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        members = [plain(member, tensor=tensor, name=f"{name}[{number}]") for number, member in enumerate(value)]
        return members if isinstance(value, list) else tuple(members)
    if value is None or isinstance(value, (torch.dtype, torch.device)):
        return value
    for kind in (bool, int, float, complex, str, bytes):
        if isinstance(value, kind):
            return kind(value)  # of a subclass, too
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{name} in a checkpoint is of type {type(value).__name__}, which could not be read back")


def earlier(path: Path, number: int) -> Path:
    """Where `save` keeps the state before the newest: `last.pt` for 0, `last-1.pt` for the one before, and so on."""
    return path if number == 0 else path.with_name(f"{path.stem}-{number}{path.suffix}")


def _shift(path: Path, keep: int) -> None:
    """Each kept file takes the name of the next older one; `path` itself never ceases to be there."""
    for number in range(keep - 1, 1, -1):
        if earlier(path, number - 1).exists():
            os.replace(earlier(path, number - 1), earlier(path, number))
    if keep > 1:
        copy = path.with_name(path.name + ".copy")
        copy.unlink(missing_ok=True)
        try:
            os.link(path, copy)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, copy)
        os.replace(copy, earlier(path, 1))
    number = max(keep, 1)
    while earlier(path, number).exists():  # more were kept before
        earlier(path, number).unlink()
        number += 1


def load_newest(path: Path) -> tuple[dict[str, Any], Path]:
    """What was saved last, and the file that has it: an earlier one, with a warning, where `path` is damaged.

    Raises:
        ValueError: `path` is damaged, and there is no earlier file that is not.
    """
    try:
        return load(path), path
    except ValueError as error:
        number = 1
        while (older := earlier(path, number)).exists():
            try:
                state = load(older)
            except ValueError:
                number += 1
                continue
            log.warning("%s; going on from %s", error, older)
            return state, older
        raise


def go_on_from(found: Path, *, last: Path, best: Path) -> None:
    """Name the files as a run that goes on from `found` needs them."""
    if found != last:
        shutil.copyfile(last, last.with_name(last.name + ".damaged"))  # no moment without a last.pt, which would begin anew
        os.replace(found, last)
    if (regular := earlier(best, 1)).exists():
        os.replace(regular, best)  # the validation at the end of a shorter run is not part of this one


def _first_os_error(error: BaseException | None) -> OSError | None:
    """What made a write fail: torch's zip writer hides it behind an error of its own."""
    found = None
    while error is not None:
        found = error if isinstance(error, OSError) else found
        error = error.__context__
    return found


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ours onto the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a checkpoint of ours, or is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist; a run folder keeps its own under checkpoints/last.pt and checkpoints/best.pt")
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        reason = (str(error).splitlines() or ["it is empty"])[0]  # the EOFError of an empty file says nothing
        raise ValueError(f"checkpoint {path} cannot be read: it is damaged or not a checkpoint ({reason})") from error
    if not isinstance(state, dict) or not set(REQUIRED) <= state.keys():
        raise ValueError(f"{path} is not a checkpoint of this project: it lacks one of the keys {', '.join(REQUIRED)}")
    return plain(state)


def _numpy_scalars() -> list[Any]:
    """What files from before `plain` may hold: numpy's numbers, which run no code, under both names of their constructor."""
    scalar = np.float64(0).__reduce__()[0]
    types = {type(np.dtype(name)) for name in "?bhilqBHILQefdgFDG"}
    return [np.dtype, *types, (scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Copy weights into a model that has exactly the same parameters and buffers.

    Raises:
        ValueError: they belong to another model; names the first that does not fit.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in weights]
    unexpected = [name for name in weights if name not in own]
    reshaped = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if missing or unexpected or reshaped:
        parts = [f"{len(names)} {what} (first: {names[0]})" for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped)) if names]
        raise ValueError(f"checkpoint {path} is of another model: {', '.join(parts)}; use the model it was trained with")
    model.load_state_dict(weights)
