"""The reports of the study, made from the rows of claim_rows.py.

Of claim.py: verdicts in words and a table over seeds. Of avletters.py and jhmdb*.py, where each video is predicted once by a network that was
not trained on its group: differences within a video, with standard errors over the groups.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
from claim_rows import ROWS, Predictions, Row, updated

from atfr.utils.atomic_io import write_text

RESULTS, DETAILS = Path("docs/results.md"), Path("studies/claim/README.md")
OURS = ("atfr", "glance", "features", "input")  # the preset's layer, the one that learns, the preset's by what the sampled features show, and on the clips themselves
FIXED = ("uniform", "stride", "random", "input-uniform", "input-stride")  # what keeps equally many features of all clips
ONE = "one seed against"  # what `relation` says of it
Groups = dict[tuple[str, str, str], list[Row]]  # by data, method and budget


def report(runs: Path) -> None:
    """Put the results under `runs` among the rows; write the verdict and the table from all of these."""
    rows = updated(runs)
    if not rows:
        print("no run has ended yet, so there is nothing to report")
        return
    groups = grouped(rows)
    text, verdict_text = body(groups), headline(groups)
    fill(RESULTS, "verdict", verdict_text)
    fill(DETAILS, "report", text)
    print(f"{text}\n{verdict_text}\n{len(rows)} rows in {ROWS}; verdict in {RESULTS}, tables in {DETAILS}")


def fill(document: Path, name: str, text: str, *, script: str = "claim.py") -> None:
    """Write `text` between the document's two marks of that name."""
    begin, end = f"<!-- {script}: {name} -->", f"<!-- {script}: end of {name} -->"
    before, found, rest = document.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{document} has no lines {begin} and {end} to write between")
    write_text(document, f"{before}{begin}\n{text}\n{end}{after}")


def body(groups: Groups) -> str:
    """Return the verdicts on all data and networks, and the table of every method."""
    rows = [row for members in groups.values() for row in members]
    names = sorted({row.data for row in rows})
    commits = ", ".join(sorted({row.commit[:8] for row in rows if row.commit}))
    lines = [*(line for data in names for line in verdict(data, groups)), "", f"{len(rows)} results of commits {commits}.", ""]
    return "\n".join([*lines, *(line for data in names for line in table(data, groups))])


def grouped(rows: list[Row]) -> Groups:
    """The rows of all seeds, by data, method and budget."""
    groups: Groups = defaultdict(list)
    for row in rows:
        groups[row.data, row.method, row.budget].append(row)
    return groups


def table(data: str, groups: Groups) -> list[str]:
    """One line a method: means over seeds, with the standard error of top-1."""
    lines = [
        f"**{data}**", "",
        "| method | budget | seeds | top-1, % | mean class, % | GFLOPs of dense | time of dense | B' mean (min-max) of T | B' follows change: test, played | static, busy |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    own = [(key[1:], rows) for key, rows in groups.items() if key[0] == data]
    for (method, budget), rows in own:
        tops = [row.top1 for row in rows]
        kept = f"{mean(r.bins for r in rows):.1f} ({min(r.least for r in rows)}-{max(r.most for r in rows)}) of {rows[0].frames}"
        follows = known(mean(r.follows_change for r in rows), mean(r.follows_played for r in rows), digits=2)
        ends = known(mean(r.static for r in rows), mean(r.busy for r in rows), digits=1)
        times = [row.time for row in rows if row.time == row.time]
        time = f"{mean(times):.2f}" if times else ""
        lines.append(
            f"| {method} | {budget} | {len(rows)} | {with_error(tops)} | {mean(r.balanced for r in rows):.1f} | {mean(r.gflops for r in rows):.3f} | {time}"
            f" | {kept} | {follows} | {ends} |"
        )
    return [*lines, ""]


def known(*values: float, digits: int) -> str:
    return ", ".join("–" if value != value else f"{value:.{digits}f}" for value in values) if any(value == value for value in values) else ""


class Against(NamedTuple):
    """One of our layers against one other method, on the seeds that both have."""

    method: str
    level: float  # its mean accuracy on these seeds, %
    cost: float  # its GFLOPs, of dense
    differences: list[float]  # ours less its own, one a seed

    @property
    def says(self) -> str:
        return relation(self.differences)

    def __str__(self) -> str:
        seeds = len(self.differences)
        return f"**{self.says}** {self.method}, {self.level:.1f} % at {self.cost:.2f}: {signed(self.differences)} ({seeds} seed{'s' * (seeds > 1)})"


class Verdict(NamedTuple):
    """One run of our layers against all else on one dataset and network."""

    own: str
    level: float  # its mean accuracy, %
    cost: float  # its GFLOPs, of dense
    dense: Against | None  # None: no seed of it
    rival: Against | None  # the best of what costs the same and looks at no clip
    lines: list[str]


def verdicts(data: str, groups: Groups) -> tuple[list[Verdict], list[Verdict]]:
    """What came out for one dataset and network, for each of our layers as costly as half the GFLOPs allow; and for the preset where it costs more.

    In mean class accuracy, which is top-1 where all classes have as many test videos. Runs of a seed start from the
    same weights, so differences are taken within seeds.
    """
    trained = trainings(data, groups)
    if "dense" not in trained:
        return [], []
    cost = {method: mean(row.gflops for row in rows.values()) for method, rows in trained.items()}
    within, more = [], []
    for family in OURS:
        members = sorted((method for method in trained if size_of(method, family)), key=cost.get)
        fitting = [method for method in members if round(cost[method], 2) <= 0.5]
        within += fitting[-1:]
        more += members[len(fitting) :] if family == OURS[0] else []
    return [verdict_on(method, trained, cost) for method in within], [verdict_on(method, trained, cost) for method in more]


def trainings(data: str, groups: Groups) -> dict[str, dict[int, Row]]:
    """Rows of trained networks, by method and seed."""
    return {method: {row.seed: row for row in rows} for (at, method, budget), rows in groups.items() if at == data and not budget}


def verdict_on(own: str, trained: dict[str, dict[int, Row]], cost: dict[str, float]) -> Verdict:
    def against(method: str) -> Against | None:
        seeds = sorted(trained[own].keys() & trained[method].keys())
        ours, others = ([trained[name][seed].balanced for seed in seeds] for name in (own, method))
        return Against(method, mean(others), cost[method], [a - b for a, b in zip(ours, others)]) if seeds else None

    dense, others = against("dense"), [found for found in map(against, matched(own, cost)) if found]
    level = mean(row.balanced for row in trained[own].values())
    lines = [f"{own} {level:.1f} % at {cost[own]:.2f} of the GFLOPs"]
    if dense:
        lines.append(f"  - {dense}")
    rival = max(others, key=lambda other: (len(other.differences) > 1, other.level), default=None)  # one seed alone decides nothing
    if rival:
        lines.append(f"  - {rival}, the best of {', '.join(other.method for other in others)}")
    probed = [row for row in trained[own].values() if row.follows_played == row.follows_played]
    if probed:
        follows, static, busy = (mean(getattr(row, name) for row in probed) for name in ("follows_played", "static", "busy"))
        lines.append(f"  - B' follows the change of clips of which that is known: rank correlation {follows:.2f}; {static:.1f} bins for static clips, {busy:.1f} of {probed[0].frames} for busy ones")
    if probed and probed[0].follows_events == probed[0].follows_events:
        events, distractors = (mean(getattr(row, name) for row in probed) for name in ("follows_events", "follows_distractors"))
        lines.append(f"  - B' follows the number of events by a rank correlation of {events:.2f}, the change that means nothing by {distractors:.2f}")
    return Verdict(own, level, cost[own], dense, rival, lines)


def verdict(data: str, groups: Groups) -> list[str]:
    """The verdicts on one dataset and network as lines of the document."""
    within, more = verdicts(data, groups)
    found = [*within, *more]
    if not found:
        return [f"- **{data}**: not decided, runs are missing."]
    own = [line for entry in found for line in (f"- **{data}**: {entry.lines[0]}", *entry.lines[1:])]
    return [*own, *one_network(data, groups, trainings(data, groups))]


def headline(groups: Groups) -> str:
    """The whole study in one bold line and a table, of the preset where it was run within half of the GFLOPs and of the next of our layers elsewhere."""
    found = [(data, entry) for data in sorted({key[0] for key in groups}) for entry in verdicts(data, groups)[0][:1]]
    dense, rival = ([against.says for _, entry in found if (against := getattr(entry, field))] for field in ("dense", "rival"))
    line = (
        f"**At half of the GFLOPs or less, of {len(found)} pairs of videos and network: not below the dense network on {dense.count('above') + dense.count('not below')}, "
        f"below it on {dense.count('below')}. Against averaging or dropping frames at equal distances, at the same GFLOPs: above the best of these on "
        f"{rival.count('above')}, not below on {rival.count('not below')}, below on {rival.count('below')}. One seed, not decided: {dense.count(ONE)}.**"
    )
    heads = ("videos and network", "layer", "accuracy, %", "GFLOPs of dense", "minus dense", "minus the best fixed cost")
    rows = [(data, entry.own, f"{entry.level:.1f}", f"{entry.cost:.2f}", cell(entry.dense), cell(entry.rival)) for data, entry in found]
    return "\n".join([line, "", *(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))])


def cell(against: Against | None) -> str:
    return f"{signed(against.differences)}: {against.says} {against.method}" if against else ""


def one_network(data: str, groups: Groups, trained: dict[str, dict[int, Row]]) -> list[str]:
    """One trained network (of each that was) at several budgets, each beside what separately trained fixed-cost networks have at these GFLOPs.

    Between two of those, as between the most costly one and the dense network, on the straight line; below the cheapest
    one, that one, which costs more.
    """
    curve = [method for method in trained if size_of(method, "uniform") or method == "dense"]
    found: dict[str, list[str]] = defaultdict(list)
    for (at, method, budget), rows in groups.items():
        if at != data or not budget or not is_one_for_all(method):
            continue
        differences = []
        for row in rows:
            points = sorted((trained[other][row.seed].gflops, trained[other][row.seed].balanced) for other in curve if row.seed in trained[other])
            if points:
                differences.append(row.balanced - float(np.interp(row.gflops, *zip(*points))))
        if differences:
            found[method].append(f"{relation(differences)} at {mean(row.gflops for row in rows):.2f} ({with_error(differences, sign='+')})")
    return [f"  - one network, many budgets ({method}), against separately trained `uniform` ones: {', '.join(places)}" for method, places in found.items()]


def matched(own: str, cost: dict[str, float]) -> list[str]:
    """The methods that keep equally many features of all clips, for the GFLOPs of `own`: those that cost no more and, in their favour, the next one."""
    found: list[str] = []
    for family in FIXED:
        members = sorted((method for method in cost if size_of(method, family)), key=cost.get)
        found += members[: sum(cost[method] <= cost[own] for method in members) + 1]
    return found


def size_of(method: str, family: str) -> str:
    """The number in names such as uniform-6; empty for a method that is none of that family."""
    begin, _, size = method.rpartition("-")
    return size if begin == family and size.replace(".", "").isdigit() else ""


def is_one_for_all(method: str) -> bool:
    """Whether it is one network at several budgets, for all of which it was trained: budgets-drawn-0.36, budgets-input-drawn-0.44."""
    return method.startswith("budgets-") and "-drawn-" in method


def relation(differences: list[float]) -> str:
    """Above: by more than two standard errors; not below: not by more than one; in words."""
    if len(differences) < 2:
        return ONE
    error = standard_error(differences)
    return "above" if mean(differences) > 2 * error else "not below" if mean(differences) >= -error else "below"


def with_error(values: list[float], *, sign: str = "", digits: int = 1) -> str:
    """The mean and, of more than one seed, its standard error."""
    error = f" ± {standard_error(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.{digits}f}{error}"


def signed(differences: list[float]) -> str:
    return with_error(differences, sign="+", digits=2)


def standard_error(values: list[float]) -> float:
    """Of the mean over seeds; nan for a single one."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def paired(one: np.ndarray, other: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """Return the mean difference of two arrays of hits, in points, and its standard error with the videos of a group as one draw."""
    difference = one - other
    sums = np.bincount(groups, difference - difference.mean())
    return 100 * difference.mean(), 100 * math.sqrt(len(sums) / (len(sums) - 1) * np.square(sums).sum()) / len(difference)


def paired_table(rows: Sequence[Predictions], groups: np.ndarray) -> str:
    """Format the rows, averaged over the seeds, against the dense network and against the fixed methods at the same budget.

    A dagger marks differences that hold by Holm's method at a level of 0.05 over all differences in the table.
    """
    by_method: dict[tuple[str, str, int], list[Predictions]] = {}
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


def against(own: Sequence[Predictions], others: Sequence[Predictions], groups: np.ndarray) -> tuple[float, float] | None:
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
