"""A run folder belongs to one experiment: its config is written first and compared ever after."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping

import yaml

from atfr.utils.atomic_io import write_text

LEFT = {"training": "checkpoints/last.pt", "calibration": "calibration.json"}  # what each kind of job leaves
# What may change between the runs of one experiment without making it another one.
FREE = frozenset(
    f"trainer.{name}"
    for name in (
        *("output_dir", "max_steps", "accelerator", "devices", "workers", "timeout_s", "save_every", "keep", "log_every", "profile", "resume", "test"),
        *("checkpoint_activations", "compile"),
    )
)
# Where files lie. What they hold is compared by `contents.py` instead.
PLACES = frozenset(
    f"dataset.{name}"
    for name in (
        *("root", "train", "val", "test", "videos", "annotations", "labels", "classes", "subset", "strip_prefix", "manifest", "clip.cache", "prepare_hint"),
    )
)
START = frozenset(("model.weights", "init_from"))  # the same, where both runs have one
_ONCE = {"dataset.clip.sampling": "dense", "trainer.accumulate": 1}  # what there was before there was a choice


def claim_folder(folder: Path, config: Mapping[str, Any], kind: str, *, resume: bool) -> None:
    """Write `config.yaml` into the run folder, or check that what is there is the same experiment.

    Args:
        kind: a key of `LEFT`, what is about to be done here.

    Raises:
        ValueError: the folder holds the other kind of job, or another experiment; names the first
            key that differs. With `resume` off, if it holds any at all.
    """
    path = folder / "config.yaml"
    held = [name for name, left in LEFT.items() if (folder / left).exists()]
    if held and not resume:
        raise ValueError(f"run folder {folder} already holds a run, and trainer.resume=false; choose another trainer.output_dir or delete it")
    if held and held != [kind]:
        raise ValueError(f"run folder {folder} holds a {held[0]}, and this is a {kind}; choose another trainer.output_dir")
    if held and path.exists():
        before = flat(_read(path))
        now = flat(config)
        # A key that the folder's version did not have, and that is off now or as it was then, changes nothing.
        new = {key for key in now if key not in before and (not now[key] or now[key] == _ONCE.get(key))}
        different = [key for key in sorted(before | now) if not _is_free(key, before.get(key), now.get(key)) and key not in new]
        if different:
            key = different[0]
            more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
            found = f"{key} is {before.get(key)!r} there and {now.get(key)!r} here{more}"
            raise ValueError(f"run folder {folder} holds another experiment: {found}; {way_out(folder, kind)}")
    write_text(path, yaml.safe_dump(dict(config), sort_keys=False))


def _read(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged, so it cannot be told whether the run folder is of this experiment; choose another trainer.output_dir, or delete it")
    return config


def way_out(folder: Path, kind: str = "training") -> str:
    """Return what to do instead of going on in a folder of another experiment."""
    if kind != "training":
        return "choose another trainer.output_dir"
    best = folder / "checkpoints" / "best.pt"
    start = folder if best.exists() else folder / LEFT[kind]
    return f"choose another trainer.output_dir (to start from this run's weights: init_from={start} trainer.output_dir=NEW)"


def _is_free(key: str, before: Any, now: Any) -> bool:
    if before == now or key in FREE:
        return True
    if key in START:
        return None not in (before, now)
    return key in PLACES and not any(isinstance(value, int) for value in (before, now))  # a generated dataset has numbers of videos there


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with keys such as `dataset.clip.frames`."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        found.update(flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
    return found
