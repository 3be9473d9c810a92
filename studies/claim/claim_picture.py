"""The verdict in one picture: accuracy over GFLOPs on the three benchmarks, in docs/verdict.png.

    python studies/claim/claim_picture.py --videos ../shared/data/videos

Reads the rows that claim.py, avletters.py and jhmdb_tuned.py wrote. Error bars are one standard error of the accuracy: over seeds on the
generated videos, over speakers and sources on the real ones, whose lists in `--videos` say which videos belong together.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np
from claim_report import paired, standard_error
from claim_rows import Predictions, Row, groups_of, read_folds, saved, saved_predictions

ROOT = Path(__file__).resolve().parents[2]
PICTURE = Path("docs/verdict.png")
GENERATED = "distractors-r2plus1d"
TITLES = (
    "generated videos with distractors\ntiny R(2+1)D, from scratch",
    "AVLetters: spoken letters\ntiny R(2+1)D, from scratch",
    "JHMDB: actions\nKinetics I3D, last blocks trained",
)
STYLES = {  # by the beginning of a method's name, of which the longest counts: what the legend says, colour and marker
    "dense": ("dense", "black", "*"),
    "uniform": ("fixed cost: mean of equal parts", "tab:gray", "o"),
    "stride": ("fixed cost: every k-th feature", "tab:brown", "s"),
    "reference": ("published layer", "tab:red", "X"),
    "atfr": ("atfr: adaptive, by pixels", "tab:cyan", "v"),
    "atfr-middle": ("the same, middle frames", "tab:blue", "^"),
    "equal": ("equally many features, by pixels", "tab:purple", "<"),
    "glance-equal": ("equally many features, learned", "tab:pink", ">"),
    "glance": ("glance: adaptive, learned", "tab:green", "D"),
}  # fmt: skip


class Point(NamedTuple):
    """One method at one cost."""

    method: str
    location: str  # of the layer
    gflops: float  # of dense
    top1: float  # %
    error: float  # one standard error; nan: of a single seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, default=Path("../shared/data/videos"), help="folder of avletters/folds.csv and jhmdb/folds.csv (default: %(default)s)")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    panels = [generated(saved())]
    for name, folder in (("avletters", "avletters"), ("jhmdb_tuned", "jhmdb")):
        videos = read_folds(arguments.videos / folder, way_out="--videos names the folder of the real videos with their lists")
        panels.append(real(list(saved_predictions(Path(f"studies/claim/{name}.csv")).values()), groups_of(videos)))
    draw(panels, PICTURE)
    print(f"wrote {PICTURE}")


def generated(rows: list[Row]) -> list[Point]:
    """The methods that were trained on the generated videos, over seeds."""
    by_method: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.data == GENERATED and not row.budget and style_of(row.method):
            by_method[row.method].append(row)
    return [Point(method, "", mean(r.gflops for r in own), mean(r.top1 for r in own), standard_error([r.top1 for r in own])) for method, own in by_method.items()]


def real(rows: list[Predictions], groups: np.ndarray) -> list[Point]:
    """The methods that were run on real videos."""
    by_method: dict[tuple[str, str, int], list[Predictions]] = defaultdict(list)
    for row in rows:
        if style_of(row.method):
            by_method[row.location, row.method, row.kept].append(row)
    points = []
    for (location, method, _), own in by_method.items():
        hits = np.mean([row.hits for row in own], axis=0)
        points.append(Point(method, location, mean(row.gflops for row in own), *paired(hits, np.zeros_like(hits), groups)))
    return points


def style_of(method: str) -> str:
    """The key of STYLES for a method, in which `equal` counts wherever it stands in the name; empty for one that the picture leaves out."""
    if method.endswith("as-many"):
        return ""
    if "equal" in method.split("-"):
        return "glance-equal" if method.startswith("glance") else "equal"
    return max((begin for begin in STYLES if f"{method}-".startswith(f"{begin}-")), key=len, default="")


def curves(points: Iterable[Point]) -> list[list[Point]]:
    """The points of each method and location, from the cheapest on. Of a method in the names of which its cost stands they are one curve."""
    by_location: dict[tuple[str, str], list[Point]] = defaultdict(list)
    for point in sorted(points, key=lambda point: point.gflops):
        by_location[point.method.rstrip(".-0123456789"), point.location].append(point)
    return list(by_location.values())


def apart(points: list[Point]) -> tuple[list[Point], list[Point]]:
    """Divide the points of a panel into those that are drawn, and those so far below that they would squeeze the others: more than twice their range."""
    drawn = sorted(points, key=lambda point: point.top1)
    below: list[Point] = []
    while len(drawn) > 2 and drawn[1].top1 - drawn[0].top1 > 2 * (drawn[-1].top1 - drawn[1].top1):
        below.append(drawn.pop(0))
    return drawn, below


def draw(panels: list[list[Point]], file: Path) -> None:
    """Draw one panel a benchmark, and one legend for all."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 4.3))
    for axis, title, panel in zip(axes, TITLES, panels):
        points, below = apart(panel)
        if below:
            said = ", ".join(f"{STYLES[style_of(point.method)][0]}: {point.top1:.0f} %" for point in below)
            axis.text(0.97, 0.03, f"below: {said}", transform=axis.transAxes, ha="right", fontsize=8)
        for key, (label, colour, marker) in STYLES.items():
            for curve in curves(point for point in points if style_of(point.method) == key):
                x, y, error = ([getattr(point, field) for point in curve] for field in ("gflops", "top1", "error"))
                axis.errorbar(x, y, yerr=error, label=label, color=colour, marker=marker, markersize=7, capsize=2, linewidth=1)
        axis.axvline(0.5, color="lightgray", linestyle=":", zorder=0)
        axis.set_title(title, fontsize=10)
        axis.set(xlabel="mean GFLOPs of a clip / dense", xlim=(0.2, 1.05))
        axis.grid(alpha=0.2)
    axes[0].set_ylabel("top-1, %")
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    labels = [label for label, *_ in STYLES.values() if label in handles]
    figure.legend([handles[label] for label in labels], labels, loc="lower center", ncols=4, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
