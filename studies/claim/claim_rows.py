"""The rows of the study: what every run of claim.py found, and the predictions of avletters.py and jhmdb*.py for all real videos.

The reports are made from these files. Runs lie under runs/, which git does not keep, so a report first takes the
rows that are there and puts those of the runs on this machine in their places.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Iterator, Sequence, TypeVar

import numpy as np
from claim_probe import RESULT as PROBED
from claim_probe import spearman

from atfr.utils.atomic_io import write_text

ROWS = Path("studies/claim/rows.csv")
NAN = float("nan")
Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Row:
    """One test of one trained (or calibrated) network."""

    data: str  # and the network: uneven-x3d
    method: str
    seed: int
    budget: str  # of a calibration; empty for a training
    top1: float
    balanced: float  # mean class accuracy
    gflops: float  # mean over clips, of dense
    bins: float
    least: int
    most: int
    frames: int
    histogram: str  # of B' over the test clips: 6:410 7:390; empty where it was not kept
    follows_change: float  # Spearman's rank correlation of B' with the true amount of change; nan where that is not known
    follows_played: float  # the same on the clips of claim_probe.py, which differ in it
    static: float  # mean B' of clips that hold one frame
    busy: float  # mean B' of clips whose every frame is of another video
    follows_events: float  # as follows_played, with the number of events; nan of videos without distractors
    follows_distractors: float  # the same with the amount of change that means nothing
    time: float  # in the network, of dense; nan where it was not measured
    commit: str

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.data, self.method, self.budget, self.seed


@dataclass(frozen=True)
class Predictions:
    """The predictions of one method with one seed for all videos."""

    location: str
    method: str
    kept: int  # features that the fixed methods keep at this budget; 0: all
    seed: int
    bins: float  # mean B'
    gflops: float  # mean, of dense
    right: str  # for each video, in the order of folds.csv: 1 if the prediction is right, else 0

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.location, self.method, self.kept, self.seed

    @property
    def hits(self) -> np.ndarray:
        return np.array([letter == "1" for letter in self.right], dtype=float)


def updated(runs: Path) -> list[Row]:
    """The rows of rows.csv, in its order, after those of all runs under `runs` took their places in it or were added."""
    rows = {row.key: row for row in saved()}
    rows.update({row.key: row for row in found(runs)})
    write_rows(ROWS, Row, [rows[key] for key in sorted(rows)])
    return saved()  # as the next reader has them, who has not these runs


def saved() -> list[Row]:
    """The rows of rows.csv; none where there is no such file."""
    return read_rows(ROWS, Row)


def read_rows(path: Path, kind: type[Kind]) -> list[Kind]:
    """Read a file of dataclass records, with one column a field; none where there is no such file."""
    if not path.exists():
        return []
    kinds = {"str": str, "int": int, "float": float}
    with open(path, newline="") as file:
        return [kind(**{field.name: kinds[field.type](line.get(field.name, "nan")) for field in fields(kind)}) for line in csv.DictReader(file)]


def write_rows(path: Path, kind: type[Kind], rows: Sequence[Kind]) -> None:
    """Write dataclass records for `read_rows`, with four digits of each float."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(kind)])
    writer.writerows([f"{value:.4g}" if isinstance(value, float) else value for value in asdict(row).values()] for row in rows)
    write_text(path, text.getvalue())


def found(runs: Path) -> Iterator[Row]:
    """The rows of the runs that have ended."""
    for path in runs.glob("*/*/*/*.json"):
        if path.name not in ("results.json", "calibration.json"):
            continue
        data, method, seed = path.parent.parts[-3:]
        results = json.loads(path.read_text())
        probe = path.with_name(PROBED)
        probed = json.loads(probe.read_text()) if probe.exists() else {}
        for result in results if isinstance(results, list) else [results]:
            bins, gflops = result["bins"], result["gflops"]
            yield Row(
                data, method, int(seed), f"{result['budget']:g}" if "budget" in result else "",
                result["top1"], result["mean_class_accuracy"], gflops["mean"] / gflops["dense"],
                bins["mean"], bins["min"], bins["max"], bins["frames"], " ".join(f"{kept}:{clips}" for kept, clips in bins["histogram"].items()),
                follows_change(path.with_name("predictions.csv")) if "budget" not in result else NAN,
                *(probed.get(key, NAN) for key in ("spearman", "static", "busy", "events_spearman", "distractors_spearman", "time_of_dense")),
                result["protocol"]["commit"] or "",
            )  # fmt: skip


def follows_change(predictions: Path) -> float:
    """Spearman's rank correlation, over the test clips, of B' with how much the video changes; nan of other than generated videos."""
    if not predictions.exists():
        return NAN
    with open(predictions, newline="") as file:
        rows = [(Path(row["video"]), float(row["bins"].split("/")[0])) for row in csv.DictReader(file)]
    truth = rows[0][0].parents[2] / "truth.csv"  # ROOT/test/CLASS/FILE
    if not truth.exists():
        return NAN
    change = changes(truth)
    pairs = [(bins, change["/".join(video.parts[-3:])]) for video, bins in rows]
    return spearman(*(np.array(values) for values in zip(*pairs)))


@cache
def changes(truth: Path) -> dict[str, float]:
    """How much each generated video changes from frame to frame; the same file serves all runs on its data."""
    with open(truth, newline="") as file:
        return {row["path"]: float(row["change"]) for row in csv.DictReader(file)}


def read_folds(folder: Path, *, way_out: str) -> list[dict[str, str]]:
    """Read a set's list: relative_path, label, group and fold of each video. Ends the program, with the way out, where it is missing."""
    folds = folder / "folds.csv"
    if not folds.exists():
        sys.exit(f"error: {folds} is missing: {way_out}")
    with open(folds, newline="") as file:
        return list(csv.DictReader(file))


def groups_of(videos: Sequence[dict[str, str]]) -> np.ndarray:
    """The number of the group of each video [N]."""
    return np.unique([video["group"] for video in videos], return_inverse=True)[1]


def saved_predictions(path: Path) -> dict[tuple[str, str, int, int], Predictions]:
    """Read the predictions in a file; none where there is no such file."""
    return {row.key: row for row in read_rows(path, Predictions)}
