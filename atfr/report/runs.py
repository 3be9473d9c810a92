"""Find run folders and read what is in them. A file that is missing or damaged becomes a reason in the report, not an error."""

from __future__ import annotations

import csv
import glob
import json
import math
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from atfr.engine.run.run_dir import flat
from atfr.engine.run.run_lock import DEAD_S, NAME
from atfr.utils.printable import one_line

MARKS = ("config.yaml", "results.json")  # a folder with one of these is a run
CONTENTS = "config.yaml, metrics.jsonl, checkpoints/, and after the test results.json and predictions.csv"
PRUNED = {"checkpoints", "tensorboard", "profile", "examples", "export"}  # no runs are in these folders
SMALLEST = 1e-9  # GFLOPs
LONGEST_CLIP = 100_000  # features
_OF_A_TRAINING = ("dataset.train", "dataset.class_names", "dataset.make")
Points = tuple[tuple[int, float], ...]  # (step, value)


@dataclass(frozen=True)
class Bins:
    """B' at one SGS layer over all test clips."""

    mean: float
    frames: int  # T
    histogram: dict[int, int]  # clips by B'


@dataclass(frozen=True)
class Results:
    """The contents of `results.json`, or of one entry of `calibration.json`. Accuracies are in percent."""

    top1: float
    top5: float
    mean_class_accuracy: float
    num_videos: int
    num_views: int
    failed: int  # videos that could not be read
    gflops: float  # mean of a clip
    dense_gflops: float
    bins: tuple[Bins, ...]  # one for each layer
    clips_per_second: float | None  # of the network alone; None if it was not measured
    protocol: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run folder, or one budget of a calibration folder."""

    folder: Path
    budget: float | None = None  # of a calibration
    results: Results | None = None
    reason: str = ""  # why there are no results
    notes: tuple[str, ...] = ()  # about files that are damaged
    config: dict[str, Any] = field(default_factory=dict)  # flat, of the test if there was one
    config_text: str = ""
    loss: Points = ()
    top1: Points = ()  # of the validation

    @property
    def name(self) -> str:
        return str(self.folder) if self.budget is None else f"{self.folder} (budget {self.budget:g})"


@dataclass
class ClassTotals:
    """Sums over the test clips of one class."""

    clips: int = 0
    right: int = 0  # clips whose own prediction is the label
    gflops: float = 0.0
    bins: float = 0.0  # at the first layer


def find_runs(paths: Sequence[str]) -> list[Run]:
    """Read the runs in these folders and below. A pattern such as `runs/*x3d*` stands for the paths that match it.

    Returns:
        The runs in the order of `paths`, those of one path sorted by name. A path without a run is one run with a reason.

    Raises:
        ValueError: there is no run at all; names the paths.
    """
    found: dict[Path, list[Run]] = {}
    missing = []
    for path in paths:
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        folders = [folder for match in matches for folder in _run_folders(Path(match))]
        if not folders:
            missing.append((path, "does not exist" if not matches else "holds no run"))
        for folder in folders:
            if folder.resolve() not in found:
                found[folder.resolve()] = _read_folder(folder)
    if not found:
        said = "; ".join(f"{path} {reason}" for path, reason in missing)
        raise ValueError(f"no run found: {said}. A run folder holds {CONTENTS}")
    runs = [run for runs in found.values() for run in runs]
    return runs + [Run(Path(path), reason=reason) for path, reason in missing]


def _run_folders(top: Path) -> Iterator[Path]:
    if top.is_file():
        top = top.parent
    seen: set[str] = set()
    for folder, below, files in os.walk(top, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder above it
            below.clear()
            continue
        seen.add(real)
        is_run = any(mark in files for mark in MARKS)
        below[:] = sorted(name for name in below if not name.startswith(".") and not (is_run and name in PRUNED))
        if is_run:
            yield Path(folder)


def _read_folder(folder: Path) -> list[Run]:
    """Read one folder: a run, or one for each budget of a calibration."""
    notes: list[str] = []
    tested = (folder / "results.json").exists()
    config_text, config = _config(folder / "config.yaml", notes)
    if tested:
        test_text, test_config = _config(folder / "test_config.yaml", notes)
        config_text, config = test_text or config_text, _as_tested(config, test_config)
    loss, top1, state = _metrics(folder / "metrics.jsonl", config, notes)
    runs = []
    if (folder / "calibration.json").exists():
        runs += _calibrated(folder / "calibration.json", config, config_text)
    if tested or not runs:
        results, reason = _results_of(folder / "results.json") if tested else (None, _why_untested(folder, state, config))
        if not config and results is not None:
            config = flat({"model": results.protocol.get("model")})
        runs.append(Run(folder, None, results, reason, tuple(notes), config, config_text, loss, top1))
    return runs


def _calibrated(path: Path, config: dict[str, Any], config_text: str) -> list[Run]:
    try:
        runs = []
        for entry in json.loads(path.read_text(encoding="utf-8")):
            budget = _number(entry, "budget")
            own = {**config, "model.sgs.gflops": budget} if config else flat({"model": entry.get("protocol", {}).get("model")})
            runs.append(Run(path.parent, budget, _parse_results(entry), config=own, config_text=config_text))
        return runs
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return [Run(path.parent, reason=f"{path.name} is damaged: {one_line(str(error))}", config=config, config_text=config_text)]


def _results_of(path: Path) -> tuple[Results | None, str]:
    try:
        return _parse_results(json.loads(path.read_text(encoding="utf-8"))), ""
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return None, f"{path.name} is damaged: {one_line(str(error))}"


def _parse_results(raw: Any) -> Results:
    """Check the values of `results.json`.

    Raises:
        ValueError: a value is missing, not a number or impossible; names its key.
    """
    layers = raw["bins"].get("layers", [raw["bins"]]) if isinstance(raw, Mapping) and isinstance(raw.get("bins"), Mapping) else []
    speed = _number(raw, "clips_per_second") if isinstance(raw, Mapping) and "clips_per_second" in raw else 0.0
    return Results(
        top1=_number(raw, "top1", most=100),
        top5=_number(raw, "top5", most=100),
        mean_class_accuracy=_number(raw, "mean_class_accuracy", most=100),
        num_videos=int(_number(raw, "num_videos", least=1)),
        num_views=int(_number(raw, "num_views", least=1)),
        failed=len(raw.get("failed", [])),
        gflops=_number(raw, "gflops", "mean", least=SMALLEST),
        dense_gflops=_number(raw, "gflops", "dense", least=SMALLEST),
        bins=tuple(_bins(layer) for layer in layers),
        clips_per_second=speed if speed > 0 else None,
        protocol=dict(raw.get("protocol", {})),
    )


def _bins(layer: Mapping[str, Any]) -> Bins:
    histogram = {int(kept): _number(layer, "histogram", kept) for kept in layer.get("histogram", {})}
    frames = int(_number(layer, "frames", least=1, most=LONGEST_CLIP))
    return Bins(_number(layer, "mean"), frames, {kept: int(count) for kept, count in histogram.items()})


def _number(raw: Any, *keys: str, least: float = 0.0, most: float = 1e15) -> float:
    value = raw
    for key in keys:
        if not isinstance(value, Mapping) or key not in value:
            raise ValueError(f"it lacks {'.'.join(keys)}")
        value = value[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:  # nor is NaN
        raise ValueError(f"{'.'.join(keys)} is {value!r}")
    return float(value)


def _config(path: Path, notes: list[str]) -> tuple[str, dict[str, Any]]:
    """Read a config as text and as a flat mapping; both are empty if there is none, or it is damaged."""
    if not path.exists():
        return "", {}
    try:
        text = path.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
        if not isinstance(config, dict):
            raise ValueError("it holds no options")
        return text, flat(config)
    except (OSError, ValueError, yaml.YAMLError) as error:
        notes.append(f"{path.name} is damaged: {one_line(str(error))}")
        return "", {}


def _as_tested(trained: Mapping[str, Any], tested: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a training with what its test changed. A test takes the classes from the checkpoint, not from a training list."""
    if not tested:
        return dict(trained)
    kept = {key: value for key, value in trained.items() if not key.startswith("model.")}
    return {**kept, **{key: value for key, value in tested.items() if not (key in kept and key in _OF_A_TRAINING)}}


@dataclass(frozen=True)
class _Trained:
    """How far a training is, as far as metrics.jsonl tells."""

    step: int = 0
    epoch: int = 0  # 1-based
    steps: int | None = None  # of the whole schedule; None if no epoch is complete


def _metrics(path: Path, config: Mapping[str, Any], notes: list[str]) -> tuple[Points, Points, _Trained]:
    """Read the curves. A line that is no JSON, such as the last one of a run that was killed, is left out."""
    entries, bad = [], 0
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {one_line(str(error))}")
        lines = []
    for line in lines:
        try:
            entry = json.loads(line)
            entries.append((int(entry["step"]), int(entry["epoch"]), str(entry["split"]), entry))
        except (ValueError, KeyError, TypeError):
            bad += 1
    if bad > 1 or (bad and not entries):
        notes.append(f"{path.name} is damaged: {bad} of its {len(lines)} lines are no metrics")
    loss = _points(entries, "train", "loss")
    top1 = _points(entries, "val", "top1")
    epochs, last = config.get("trainer.epochs"), max(entries, key=lambda entry: entry[0], default=None)
    if last is None:
        return loss, top1, _Trained()
    # The last line of an epoch that another one follows is at its end.
    ends = [(one[0], one[1] + 1) for one, two in zip(entries, entries[1:]) if two[1] == one[1] + 1]
    steps = ends[0][0] * epochs // ends[0][1] if ends and isinstance(epochs, int) else None
    return loss, top1, _Trained(last[0], last[1] + 1, steps)


def _points(entries: Sequence[tuple[int, int, str, Mapping[str, Any]]], split: str, key: str) -> Points:
    found = [(step, entry.get(key)) for step, _, of, entry in entries if of == split]
    return tuple((step, float(value)) for step, value in found if isinstance(value, (int, float)) and math.isfinite(value))


def _why_untested(folder: Path, trained: _Trained, config: Mapping[str, Any]) -> str:
    """Say how far a run without results is, and how to go on."""
    done = trained.steps is not None and trained.step >= trained.steps
    if trained.step == 0:
        where = "no step in metrics.jsonl"
    elif trained.steps is not None:
        where = f"trained to step {trained.step} of {trained.steps}"
    else:
        where = f"trained to step {trained.step}, in epoch {trained.epoch} of {config.get('trainer.epochs', '?')}"
    limit = config.get("trainer.max_steps")
    if isinstance(limit, int) and trained.step >= limit:
        where += f" (trainer.max_steps={limit})"
        done = True
    job = _job(folder)
    if job:
        return f"{where}; {job}"
    if done and (folder / "checkpoints" / "best.pt").exists():
        return f"{where}; not tested: python tools/test.py checkpoint={shlex.quote(str(folder))}"
    if (folder / "checkpoints" / "last.pt").exists():
        return f"{where}; not finished: run its command again"
    return f"{where}; no checkpoint was saved"


def _job(folder: Path) -> str:
    """Describe the job that works in the folder, if there is one."""
    path = folder / NAME
    try:
        age = time.time() - path.stat().st_mtime
        holder = json.loads(path.read_text(encoding="utf-8", errors="replace").partition("\n")[0])
        job = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f"running ({job})" if age < DEAD_S else f"killed ({job}): run its command again"


def class_totals(folder: Path) -> dict[str, ClassTotals]:
    """Sum up `predictions.csv` by class.

    Raises:
        ValueError: the file is missing or damaged; says where.
    """
    path = folder / "predictions.csv"
    totals: dict[str, ClassTotals] = {}
    try:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            label, prediction, bins, gflops = (header.index(name) for name in ("label", "prediction", "bins", "gflops"))
            for row in rows:
                kept, cost = int(row[bins].partition("/")[0]), float(row[gflops])
                one = totals.setdefault(row[label], ClassTotals())
                one.clips += 1
                one.right += row[label] == row[prediction]
                one.bins += kept
                one.gflops += cost
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read ({error.strerror})") from error
    except (ValueError, IndexError, csv.Error) as error:
        clips = sum(one.clips for one in totals.values())
        raise ValueError(f"{path.name} is damaged after {clips} clips: {one_line(str(error))}") from error
    return totals
