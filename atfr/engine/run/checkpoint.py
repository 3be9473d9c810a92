"""Checkpoint files: written atomically, and read without running code from the file."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from atfr.utils.atomic_io import atomic_write, sync

REQUIRED = ("model", "config", "choices", "class_names")


def save(state: dict[str, Any], path: Path, *, keep: int = 1) -> None:
    """Write `state` to `path`. A kill or a full disk leaves the previous file intact.

    With `keep` above 1 the previous files are kept under the names that `earlier` gives, up to `keep` files in all.

    Raises:
        OSError: the file could not be written; says whether there is a previous one.
        TypeError: `state` has a value that `load` would refuse to read; names it.
    """
    state = plain(state)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_write(path, durable=True, only_writer=True) as temporary:
            with open(temporary, "wb") as file:
                torch.save(state, file)
            sync(temporary)  # the previous files are renamed only after this one is on the disk
            if path.exists():
                _shift(path, keep)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        previous = "the previous one is intact" if path.exists() else "there is no previous one"
        cause = _first_os_error(error)
        reason = cause.strerror if cause else str(error).splitlines()[0]
        raise OSError(f"checkpoint {path} could not be written ({reason}); {previous}: make room and run the same command again") from error


def plain(value: Any, *, tensor: Callable[[Tensor], Tensor] = lambda tensor: tensor, name: str = "state") -> Any:
    """Convert `value` to the types that a checkpoint may hold: Python's own, tensors, and torch's dtypes and devices.

    Args:
        tensor: applied to each tensor.
        name: of `value`, for the error.

    Raises:
        TypeError: a value of another type; names where it is.
    """
    if isinstance(value, Tensor):
        return tensor(value)
    if isinstance(value, np.generic):
        return plain(value.item(), name=name)
    if isinstance(value, Mapping):
        return {plain(key, name=name): plain(member, tensor=tensor, name=f"{name}.{key}") for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        members = [plain(member, tensor=tensor, name=f"{name}[{number}]") for number, member in enumerate(value)]
        return members if isinstance(value, list) else tuple(members)
    if value is None or isinstance(value, (torch.dtype, torch.device)):
        return value
    kinds: tuple[type[Any], ...] = (bool, int, float, complex, str, bytes)
    for kind in kinds:
        if isinstance(value, kind):
            return kind(value)  # also of a subclass
    raise TypeError(f"{name} in a checkpoint is of type {type(value).__name__}, which could not be read back")


def earlier(path: Path, number: int) -> Path:
    """Return the name of an earlier checkpoint that `save` keeps: `last.pt` for 0, `last-1.pt` for the one before it, and so on."""
    return path if number == 0 else path.with_name(f"{path.stem}-{number}{path.suffix}")


def _shift(path: Path, keep: int) -> None:
    """Rename each kept file to the next older name. `path` itself exists at every moment."""
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
    while earlier(path, number).exists():  # `keep` was higher before
        earlier(path, number).unlink()
        number += 1


def _first_os_error(error: BaseException | None) -> OSError | None:
    """Return the OSError behind an error of torch's zip writer, if there is one."""
    found = None
    while error is not None:
        found = error if isinstance(error, OSError) else found
        error = error.__context__
    return found


def load(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Args:
        mmap: read each tensor when it is used.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or was not written by `save`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist; a run folder has its checkpoints in checkpoints/last.pt and checkpoints/best.pt")
    way_out = "give a run folder or a file of its checkpoints/"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:  # its text advises to load the file with weights_only=False, which runs code from it
        raise ValueError(f"checkpoint {path} cannot be read: it is damaged or not a checkpoint of this project; {way_out}") from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        reason = (str(error).splitlines() or ["it is empty"])[0]  # the EOFError of an empty file has no text
        raise ValueError(f"checkpoint {path} cannot be read: it is damaged or not a checkpoint ({reason})") from error
    if not isinstance(state, dict) or not set(REQUIRED) <= state.keys():
        raise ValueError(f"{path} is not a checkpoint of this project: it lacks one of the keys {', '.join(REQUIRED)}; {way_out}")
    return state


def load_weights(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Load weights into a model that has exactly the same parameters and buffers.

    Raises:
        ValueError: they belong to another model; names the first one that does not fit.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in weights]
    unexpected = [name for name in weights if name not in own]
    reshaped = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if missing or unexpected or reshaped:
        parts = [f"{len(names)} {what} (first: {names[0]})" for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped)) if names]
        raise ValueError(f"checkpoint {path} is of another model: {', '.join(parts)}; use the model it was trained with")
    model.load_state_dict(weights)
