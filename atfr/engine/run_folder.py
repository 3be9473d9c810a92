"""A run folder belongs to one experiment: its config is written first and compared ever after."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping

import yaml

from atfr.engine.files import write_text

DONE = ("checkpoints/last.pt", "calibration.json")  # what a training and a calibration leave
# What may change between the runs of one experiment without making it another one.
FREE = ("output_dir", "max_steps", "accelerator", "devices", "workers", "timeout_s", "save_every", "log_every", "resume", "test")
_ONCE = {"dataset.clip.sampling": "dense"}  # what there was before there was a choice


def claim_folder(folder: Path, config: Mapping[str, Any], *, resume: bool) -> None:
    """Write `config.yaml` into the run folder, or check that what is there is the same experiment.

    Raises:
        ValueError: the folder holds a training or a calibration of another experiment; names the
            first key that differs. With `resume` off, if it holds any at all.
    """
    path = folder / "config.yaml"
    trained = any((folder / name).exists() for name in DONE)
    if trained and not resume:
        raise ValueError(f"run folder {folder} already holds a run, and trainer.resume=false; choose another trainer.output_dir or delete it")
    if trained and path.exists():
        before = flat(_read(path))
        now = flat(config)
        # A key that the folder's version did not have, and that is off now or as it was then, changes nothing.
        new = {key for key in now if key not in before and (not now[key] or now[key] == _ONCE.get(key))}
        different = [key for key in sorted(before | now) if before.get(key) != now.get(key) and not _is_free(key) and key not in new]
        if different:
            key = different[0]
            more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
            raise ValueError(
                f"run folder {folder} holds another experiment: {key} is {before.get(key)!r} there and {now.get(key)!r} here{more};"
                " choose another trainer.output_dir"
            )
    write_text(path, yaml.safe_dump(dict(config), sort_keys=False))


def _read(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged, so it cannot be told whether the run folder is of this experiment; choose another trainer.output_dir, or delete it")
    return config


def _is_free(key: str) -> bool:
    return key in {f"trainer.{name}" for name in FREE}


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with keys such as `dataset.clip.frames`."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        found.update(flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
    return found
