"""A run folder belongs to one experiment: its config is written at the start, and compared by every later run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping

import yaml

from atfr.utils.atomic_io import write_text

OUTPUT = {"training": "checkpoints/last.pt", "calibration": "calibration.json"}  # a file that each kind of job writes
# Options that may change between the runs of one experiment.
FREE = frozenset(
    f"trainer.{name}"
    for name in (
        *("output_dir", "max_steps", "accelerator", "devices", "workers", "timeout_s", "save_every", "keep", "log_every", "profile", "resume", "test"),
        *("checkpoint_activations", "compile", "tensorboard_pictures", "examples"),
    )
)
NO_EFFECT = FREE - {"trainer.max_steps"}  # options that change no result
# Paths of files, which may move. `contents.py` compares what is in the files.
PATHS = frozenset(
    f"dataset.{name}"
    for name in (
        *("root", "train", "val", "test", "videos", "annotations", "labels", "classes", "subset", "strip_prefix", "manifest", "clip.cache", "prepare_hint"),
    )
)
START = frozenset(("model.weights", "init_from"))  # paths, too, if both runs have one


def claim_folder(folder: Path, config: Mapping[str, Any], kind: str, *, resume: bool) -> None:
    """Check a run folder as `check_folder` does, and write `config.yaml` into it."""
    check_folder(folder, config, kind, resume=resume)
    write_config(folder, config)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    write_text(folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))


def check_folder(folder: Path, config: Mapping[str, Any], kind: str, *, resume: bool) -> None:
    """Check that a run folder has no run, or one of the same experiment.

    Args:
        kind: the kind of this job, a key of `OUTPUT`.

    Raises:
        ValueError: the folder has another experiment (names the first key that differs) or a job of the other kind; with `resume`
            off, if it has any.
    """
    path = folder / "config.yaml"
    held = [name for name, left in OUTPUT.items() if (folder / left).exists()]
    if held and not resume:
        raise ValueError(f"run folder {folder} already holds a run, and trainer.resume=false; choose another trainer.output_dir or delete it")
    if held and held != [kind]:
        raise ValueError(f"run folder {folder} holds a {held[0]}, and this is a {kind}; choose another trainer.output_dir")
    if held and path.exists():
        before = flat(_read(path))
        now = flat(config)
        off = {key for key in now if key not in before and not now[key]}  # an option that is newer than the folder
        different = [key for key in sorted(before | now) if not _is_free(key, before.get(key), now.get(key)) and key not in off]
        if different:
            key = different[0]
            more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
            found = f"{key} is {before.get(key)!r} there and {now.get(key)!r} here{more}"
            raise ValueError(f"run folder {folder} holds another experiment: {found}; {way_out(folder, kind)}")


def _read(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged, so the experiment of the run folder is unknown; choose another trainer.output_dir, or delete the folder")
    return config


def way_out(folder: Path, kind: str = "training") -> str:
    """Return the advice for a folder that has another experiment."""
    if kind != "training":
        return "choose another trainer.output_dir"
    best = folder / "checkpoints" / "best.pt"
    start = folder if best.exists() else folder / OUTPUT[kind]
    return f"choose another trainer.output_dir (to start from this run's weights: init_from={start} trainer.output_dir=NEW)"


def _is_free(key: str, before: Any, now: Any) -> bool:
    if before == now or key in FREE:
        return True
    if key in START:
        return None not in (before, now)
    return key in PATHS and not any(isinstance(value, int) for value in (before, now))  # a generated dataset has the numbers of its videos there


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to one with keys such as `dataset.clip.frames`."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        found.update(flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
    return found
