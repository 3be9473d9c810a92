"""Rows of the studies on real videos (jhmdb.py, avletters.py): every prediction of a method, compared video by video.

Folds are by source or speaker, so that each video is predicted once by a network that was not trained on its group. Differences
are taken within a video, and their standard error is over the groups.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from claim_rows import read_rows, write_rows


@dataclass(frozen=True)
class Row:
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


def paired(one: np.ndarray, other: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """Return the mean difference of two arrays of hits, in points, and its standard error with the videos of a group as one draw."""
    difference = one - other
    sums = np.bincount(groups, difference - difference.mean())
    return 100 * difference.mean(), 100 * math.sqrt(len(sums) / (len(sums) - 1) * np.square(sums).sum()) / len(difference)


def table(rows: Sequence[Row], groups: np.ndarray) -> str:
    """Format the rows, averaged over the seeds, against the dense network and against the fixed methods at the same budget.

    A dagger marks differences that hold by Holm's method at a level of 0.05 over all differences in the table.
    """
    by_method: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        by_method.setdefault((row.location, row.method, row.kept), []).append(row)
    differences = {
        (key, other): difference
        for key, own in by_method.items()
        for other in others_of(key)
        if (difference := against(own, by_method.get(other, []), groups)) is not None
    }
    held = dict(zip(differences, holm([math.erfc(abs(mean) / max(error, 1e-9) / math.sqrt(2)) for mean, error in differences.values()])))
    cells = {key: "{:+.1f} ± {:.1f}".format(*difference) + (" †" if held[key] else "") for key, difference in differences.items()}
    lines = [
        "| location | features kept | method | seeds | mean B' | GFLOPs of dense | top-1, % | against dense | against uniform | against stride |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, own in by_method.items():
        location, method, kept = key
        shown = [cells.get((key, other), "") for other in others_of(key)]
        bins, gflops, top1 = (np.mean(values) for values in ([r.bins for r in own], [r.gflops for r in own], [100 * r.hits.mean() for r in own]))
        lines.append(f"| {location} | {kept or 'all'} | {method} | {len(own)} | {bins:.1f} | {gflops:.2f} | {top1:.1f} | {' | '.join(shown)} |")
    return "\n".join(lines)


def others_of(key: tuple[str, str, int]) -> tuple[tuple[str, str, int], ...]:
    """Return what a method is compared with: the dense network, and the fixed methods at its location and budget."""
    location, _, kept = key
    return ("", "dense", 0), (location, "uniform", kept), (location, "stride", kept)


def against(own: Sequence[Row], others: Sequence[Row], groups: np.ndarray) -> tuple[float, float] | None:
    """The difference to another method over the seeds that both have, with its standard error; None where there is none."""
    seeds = {row.seed for row in own} & {row.seed for row in others}
    if not seeds or own == others:
        return None
    mine, theirs = (np.mean([row.hits for row in rows if row.seed in seeds], axis=0) for rows in (own, others))
    return paired(mine, theirs, groups)


def holm(chances: Sequence[float], level: float = 0.05) -> list[bool]:
    """Return which hypotheses, of these probabilities, are rejected at a level for all of them together (Holm 1979)."""
    order = sorted(range(len(chances)), key=chances.__getitem__)
    rejected = [False] * len(chances)
    for tried, index in enumerate(order):
        if chances[index] > level / (len(chances) - tried):
            break
        rejected[index] = True
    return rejected


def saved(path: Path) -> dict[tuple[str, str, int, int], Row]:
    """Read the rows of a file; none where there is no such file."""
    return {row.key: row for row in read_rows(path, Row)}


def save(path: Path, rows: dict[tuple[str, str, int, int], Row]) -> None:
    """Write the rows, in their order."""
    write_rows(path, Row, list(rows.values()))
