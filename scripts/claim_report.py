"""The report of scripts/claim.py: every run as a row of a CSV file, a table over seeds, and a plot."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Iterator

import numpy as np
from claim_change import RESULT as PROBED
from claim_change import spearman

from atfr.engine.files import write_text

DOCUMENT, PLOT, ROWS = Path("docs/claim.md"), Path("docs/claim.svg"), Path("benchmarks/results/claim.csv")
BEGIN, END = "<!-- claim.py: begin -->", "<!-- claim.py: end -->"


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
    follows_change: float  # Spearman's rank correlation of B' with the true amount of change; nan where that is not known
    follows_played: float  # the same on the clips of claim_change.py, which differ in it
    static: float  # mean B' of clips that hold one frame
    busy: float  # mean B' of clips whose every frame is of another video
    clips_per_second: float
    commit: str


def report(runs: Path) -> None:
    """Read every result under `runs`; write the rows, the table into the document, and the plot."""
    rows = sorted(read(runs), key=lambda row: (row.data, row.method, row.budget, row.seed))
    if not rows:
        print("no run has ended yet, so there is nothing to report")
        return
    with open(ROWS, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(Row)])
        writer.writerows([f"{value:.4g}" if isinstance(value, float) else value for value in asdict(row).values()] for row in rows)
    groups = grouped(rows)
    names = sorted({row.data for row in rows})
    commits = ", ".join(sorted({row.commit[:8] for row in rows if row.commit}))
    lines = [*(line for data in names for line in verdict(data, groups)), "", f"![top-1 over GFLOPs]({PLOT.name})", "", f"{len(rows)} results of commits {commits}.", ""]
    text = "\n".join([*lines, *(line for data in names for line in table(data, groups))])
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    write_text(DOCUMENT, f"{before}{BEGIN}\n{text}\n{END}{after}")
    plot(groups)
    print(text)
    print(f"{len(rows)} rows in {ROWS}; table in {DOCUMENT}, plot in {PLOT}")


def read(runs: Path) -> Iterator[Row]:
    for path in runs.glob("*/*/*/*.json"):
        if path.name not in ("results.json", "calibration.json"):
            continue
        data, method, seed = path.parent.parts[-3:]
        found = json.loads(path.read_text())
        probe = path.with_name(PROBED)
        played = json.loads(probe.read_text()) if probe.exists() else {}
        for result in found if isinstance(found, list) else [found]:
            bins, gflops = result["bins"], result["gflops"]
            yield Row(
                data, method, int(seed), f"{result['budget']:g}" if "budget" in result else "",
                result["top1"], result["mean_class_accuracy"], gflops["mean"] / gflops["dense"],
                bins["mean"], bins["min"], bins["max"], bins["frames"],
                follows_change(path.with_name("predictions.csv"), Path("data/claim", data.rpartition("-")[0], "truth.csv")) if "budget" not in result else float("nan"),
                *(played.get(key, float("nan")) for key in ("spearman", "static", "busy")),
                result["clips_per_second"], result["protocol"]["commit"] or "",
            )  # fmt: skip


def follows_change(predictions: Path, truth: Path) -> float:
    """Spearman's rank correlation, over the test clips, of B' with how much the video changes."""
    if not truth.exists() or not predictions.exists():
        return float("nan")
    change = changes(truth)
    with open(predictions, newline="") as file:
        pairs = [(float(row["bins"].split("/")[0]), change["/".join(Path(row["video"]).parts[-3:])]) for row in csv.DictReader(file)]
    return spearman(*(np.array(values) for values in zip(*pairs)))


@cache
def changes(truth: Path) -> dict[str, float]:
    """How much each generated video changes from frame to frame; the same file serves all runs on its data."""
    with open(truth, newline="") as file:
        return {row["path"]: float(row["change"]) for row in csv.DictReader(file)}


def grouped(rows: list[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """The rows of all seeds, by data, method and budget."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.data, row.method, row.budget].append(row)
    return groups


def table(data: str, groups: dict[tuple[str, str, str], list[Row]]) -> list[str]:
    """One line a method: means over seeds, with the standard error of top-1."""
    lines = [
        f"**{data}**", "",
        "| method | budget | seeds | top-1, % | mean class, % | GFLOPs of dense | B' mean (min-max) of T | B' follows change: test, played | static, busy | clips/s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    own = [(key[1:], rows) for key, rows in groups.items() if key[0] == data]
    for (method, budget), rows in own:
        tops = [row.top1 for row in rows]
        kept = f"{mean(r.bins for r in rows):.1f} ({min(r.least for r in rows)}-{max(r.most for r in rows)}) of {rows[0].frames}"
        follows = known(mean(r.follows_change for r in rows), mean(r.follows_played for r in rows), digits=2)
        ends = known(mean(r.static for r in rows), mean(r.busy for r in rows), digits=1)
        lines.append(
            f"| {method} | {budget} | {len(rows)} | {with_error(tops)} | {mean(r.balanced for r in rows):.1f} | {mean(r.gflops for r in rows):.3f}"
            f" | {kept} | {follows} | {ends} | {mean(r.clips_per_second for r in rows):.0f} |"
        )
    return [*lines, ""]


def known(*values: float, digits: int) -> str:
    return ", ".join("–" if value != value else f"{value:.{digits}f}" for value in values) if any(value == value for value in values) else ""


def verdict(data: str, groups: dict[tuple[str, str, str], list[Row]]) -> list[str]:
    """What came out for one dataset and network, in words and figures: our layer at half the GFLOPs against all else.

    In mean class accuracy, which is top-1 where all classes have as many test videos. Runs of a seed start from the
    same weights, so differences are taken within seeds.
    """
    trained = {method: {row.seed: row for row in rows} for (at, method, budget), rows in groups.items() if at == data and not budget}
    cost = {method: mean(row.gflops for row in rows.values()) for method, rows in trained.items()}
    ours = [method for method in trained if size_of(method, "atfr") and round(cost[method], 2) <= 0.5]
    if not ours or "dense" not in trained:
        return [f"- **{data}**: not decided, runs are missing."]
    own = max(ours, key=cost.get)

    def against(method: str) -> str:
        seeds = trained[own].keys() & trained[method].keys()
        differences = [trained[own][seed].balanced - trained[method][seed].balanced for seed in seeds]
        level = mean(trained[method][seed].balanced for seed in seeds)
        return f"**{relation(differences)}** {method}, {level:.1f} % at {cost[method]:.2f}: {with_error(differences, sign='+')} ({len(seeds)} seeds)"

    lines = [f"- **{data}**: {own} {mean(row.balanced for row in trained[own].values()):.1f} % at {cost[own]:.2f} of the GFLOPs", f"  - {against('dense')}"]
    rivals = [method for method in matched(own, cost) if trained[own].keys() & trained[method].keys()]
    if rivals:
        lines.append(f"  - {against(max(rivals, key=lambda method: mean(row.balanced for row in trained[method].values())))}, the best of {', '.join(rivals)}")
    probed = [row for row in trained[own].values() if row.follows_played == row.follows_played]
    if probed:
        follows, static, busy = (mean(getattr(row, name) for row in probed) for name in ("follows_played", "static", "busy"))
        lines.append(f"  - B' follows the change of clips of which that is known: rank correlation {follows:.2f}; {static:.1f} bins for static clips, {busy:.1f} of {probed[0].frames} for busy ones")
    return [*lines, *one_network(data, groups, trained)]


def one_network(data: str, groups: dict[tuple[str, str, str], list[Row]], trained: dict[str, dict[int, Row]]) -> list[str]:
    """One trained network at several budgets, each beside what separately trained fixed-cost networks have at these GFLOPs.

    Between two of those, as between the most costly one and the dense network, on the straight line.
    """
    curve = [method for method in trained if size_of(method, "uniform") or method == "dense"]
    found = []
    for (at, method, budget), rows in groups.items():
        if at != data or not budget or not method.startswith("budgets-drawn"):
            continue
        differences = []
        for row in rows:
            points = sorted((trained[other][row.seed].gflops, trained[other][row.seed].balanced) for other in curve if row.seed in trained[other])
            if points and points[0][0] <= row.gflops:
                differences.append(row.balanced - float(np.interp(row.gflops, *zip(*points))))
        if differences:
            found.append(f"{relation(differences)} at {mean(row.gflops for row in rows):.2f} ({with_error(differences, sign='+')})")
    return [f"  - one network, many budgets, against separately trained `uniform` ones: {', '.join(found)}"] if found else []


def matched(own: str, cost: dict[str, float]) -> list[str]:
    """The methods that keep equally many features of all clips, for the GFLOPs of `own`: those that cost no more and, in their favour, the next one."""
    found: list[str] = []
    for family in ("uniform", "stride", "random"):
        members = sorted((method for method in cost if size_of(method, family)), key=cost.get)
        found += members[: sum(cost[method] <= cost[own] for method in members) + 1]
    return found


def size_of(method: str, family: str) -> str:
    """The number in names such as uniform-6; empty for a method that is none of that family."""
    begin, _, size = method.rpartition("-")
    return size if begin == family and size.replace(".", "").isdigit() else ""


def relation(differences: list[float]) -> str:
    """Above: by more than two standard errors; not below: not by more than one; in words."""
    if len(differences) < 2:
        return "one seed against"
    error = standard_error(differences)
    return "above" if mean(differences) > 2 * error else "not below" if mean(differences) >= -error else "below"


def with_error(values: list[float], *, sign: str = "") -> str:
    """The mean and, of more than one seed, its standard error."""
    error = f" ± {standard_error(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.1f}{error}"


def standard_error(values: list[float]) -> float:
    """Of the mean over seeds; nan for a single one."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def plot(groups: dict[tuple[str, str, str], list[Row]]) -> None:
    """Top-1 over GFLOPs, one panel for each dataset."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "claim", "svg.fonttype": "none"})  # the same file from the same figures, with words as words
    names = sorted({key[0] for key in groups})
    figure, axes = plt.subplots(1, len(names), figsize=(6 * len(names), 5), squeeze=False)
    for axis, data in zip(axes[0], names):
        curves: dict[str, list[list[Row]]] = defaultdict(list)
        for (at, method, _), rows in groups.items():
            if at == data:
                family = next((name for name in ("atfr", "uniform", "stride") if size_of(method, name)), method)
                curves[family].append(rows)
        for name, points in sorted(curves.items()):
            points.sort(key=lambda rows: mean(r.gflops for r in rows))
            x, y = ([mean(getattr(r, key) for r in rows) for rows in points] for key in ("gflops", "top1"))
            error = [standard_error([r.top1 for r in rows]) for rows in points]
            axis.errorbar(x, y, yerr=error, marker="o", markersize=3, capsize=2, linestyle=":" if name.startswith(("untrained", "budgets")) else "-", label=name)
        axis.set(title=data, xlabel="mean GFLOPs of a clip / dense", ylabel="top-1, %")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})
    plt.close(figure)
