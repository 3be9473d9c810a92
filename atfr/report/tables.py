"""The tables of a report, and the main one as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from atfr.report.compare import SEED, Entry, Estimate, entries_of, untested
from atfr.report.runs import ClassTotals, Run
from atfr.utils.printable import one_line


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    value: float | None = None  # to sort by; None: the text
    best: bool = False
    bar: float | None = None  # percent of the cell's width that is shaded
    small: str = ""  # a second line
    link: str = ""


@dataclass(frozen=True)
class Column:
    """The head of a column; numbers are right-aligned."""

    title: str
    unit: str = ""
    number: bool = True
    help: str = ""


@dataclass(frozen=True)
class Table:
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    name: str = ""  # of its filter; without one there is none
    scrolls: bool = False


@dataclass(frozen=True)
class Quantity:
    """A column of the main table, and how to compute it."""

    column: Column
    key: str  # in the CSV
    value: Callable[[Entry], Estimate | None]
    digits: str
    best: Callable[[Sequence[float]], float] | None = None  # max or min


QUANTITIES = (
    Quantity(Column("Top-1", "%"), "top1", lambda entry: entry.top1, ".2f", max),
    Quantity(Column("Top-5", "%"), "top5", lambda entry: entry.over_seeds(lambda results: results.top5), ".2f", max),
    Quantity(
        Column("Mean class", "%", help="top-1 of each class, averaged over the classes"),
        "mean_class_accuracy", lambda entry: entry.over_seeds(lambda results: results.mean_class_accuracy), ".2f", max,
    ),
    Quantity(Column("GFLOPs", "per clip"), "gflops", lambda entry: entry.gflops, ".4g", min),
    Quantity(Column("GFLOPs", "% of dense"), "gflops_percent_of_dense", lambda entry: entry.share, ".1f", min),
    Quantity(
        Column("B'", "of T", help="features kept of a clip's T features, mean over the test clips"),
        "bins", lambda entry: entry.over_seeds(lambda results: results.bins[0].mean) if all(results.bins for results in entry.results) else None, ".1f",
    ),
    Quantity(
        Column("Speed", "clips/s", help="measured in the network alone, where the run was tested"),
        "clips_per_second", lambda entry: entry.clips_per_second, ".1f", max,
    ),
)


def texts_of(value: Estimate | None, digits: str) -> tuple[str, str]:
    """Format a number, and its standard error if it has one, with as many decimals."""
    if value is None:
        return "–", ""
    if not value.error:
        return f"{value.mean:{digits}}", ""
    if digits.endswith("g") and value.mean:
        digits = f".{max(int(digits[1:-1]) - 1 - math.floor(math.log10(abs(value.mean))), 0)}f"
    return f"{value.mean:{digits}}", f"± {value.error:{digits}}"


def text_of(value: Estimate | None, digits: str) -> str:
    """Format a number and its standard error as one text."""
    return " ".join(texts_of(value, digits)).strip()


def number_cell(value: Estimate | None, digits: str, *, best: bool = False, more: str = "") -> Cell:
    text, error = texts_of(value, digits)
    return Cell(text + more, None if value is None else value.mean, best=best, small=error)


def main_table(entries: Sequence[Entry]) -> Table:
    several = any(len(entry.runs) > 1 for entry in entries)
    columns = [Column("#"), Column("Run", number=False), *([Column("Seeds", number=False)] if several else []), *_quantity_columns(entries)]
    rows = []
    bests = [_best(quantity, entries) for quantity in QUANTITIES]
    for number, entry in enumerate(entries, start=1):
        folder = one_line(entry.runs[0].name) + (f" and {len(entry.runs) - 1} more" if len(entry.runs) > 1 else "")
        seeds = [Cell(", ".join(map(str, entry.seeds)) or "–")] if several else []
        name = Cell(entry.label, small=folder, link=f"config-{number}" if entry.runs[0].config_text else "")
        rows.append([Cell(str(number), number), name, *seeds, *_quantities(entry, bests, _common_frames(entries))])
    return Table(columns, rows, name="runs")


def _common_frames(entries: Sequence[Entry]) -> int | None:
    """T of the first layer, if it is that of all runs."""
    found = {results.bins[0].frames for entry in entries for results in entry.results if results.bins}
    return found.pop() if len(found) == 1 else None


def _quantity_columns(entries: Sequence[Entry]) -> list[Column]:
    frames = _common_frames(entries)
    return [replace(one.column, unit=f"of {frames}") if one.key == "bins" and frames is not None else one.column for one in QUANTITIES]


def _quantities(entry: Entry, bests: Sequence[float | None], frames: int | None) -> list[Cell]:
    cells = []
    for quantity, best in zip(QUANTITIES, bests):
        value = quantity.value(entry)
        more = ""
        if quantity.key == "bins" and value is not None:
            layers = entry.results[0].bins
            more = f" / {layers[0].frames}" if frames is None else ""
            more += "".join(f"; {layer.mean:.1f} / {layer.frames}" for layer in layers[1:])
        # As good as the best in all digits that are shown.
        is_best = value is not None and best is not None and f"{value.mean:{quantity.digits}}" == f"{best:{quantity.digits}}"
        cells.append(number_cell(value, quantity.digits, best=is_best, more=more))
    return cells


def _best(quantity: Quantity, entries: Sequence[Entry]) -> float | None:
    values = [value.mean for entry in entries if (value := quantity.value(entry)) is not None]
    return quantity.best(values) if quantity.best is not None and len(entries) > 1 and values else None


def seed_table(entries: Sequence[Entry]) -> Table:
    """Every single run of the entries that have several."""
    columns = [Column("#"), Column("Run", number=False), Column("Seed"), *_quantity_columns(entries)]
    rows = []
    for number, entry in enumerate(entries, start=1):
        for run in entry.runs if len(entry.runs) > 1 else ():
            seed = run.config.get(SEED)
            alone = Entry((run,), entry.label, entry.method, entry.options)
            at = Cell(str(seed), float(seed) if isinstance(seed, (int, float)) else None)
            rows.append([Cell(str(number), number), Cell(entry.label, small=one_line(run.name)), at, *_quantities(alone, [None] * len(QUANTITIES), _common_frames(entries))])
    return Table(columns, rows)


def main_csv(runs: Sequence[Run]) -> str:
    """Return the main table as CSV with all digits: a row for each entry, and a column for each option that differs."""
    entries = entries_of(runs)
    options = list(dict.fromkeys(name for entry in entries for name in entry.options))
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    keys = [key for quantity in QUANTITIES for key in (quantity.key, f"{quantity.key}_standard_error")]
    writer.writerow(["number", "runs", "label", "method", "seeds", *keys, "dense_gflops", "frames", "videos", "clips", *(f"option.{name}" for name in options)])
    for number, entry in enumerate(entries, start=1):
        values = [quantity.value(entry) for quantity in QUANTITIES]
        numbers = [value for estimate in values for value in ((estimate.mean, estimate.error) if estimate else (None, None))]
        first = entry.results[0]
        writer.writerow(
            [
                number, ";".join(run.name for run in entry.runs), entry.label, entry.method, ";".join(map(str, entry.seeds)), *numbers,
                first.dense_gflops, first.bins[0].frames if first.bins else None, first.num_videos, first.num_views,
                *(entry.options.get(name) for name in options),
            ]
        )
    return text.getvalue()


def front_table(entries: Sequence[Entry], front: Sequence[int]) -> Table:
    """What each step along the Pareto front costs and brings."""
    columns = [Column("#"), Column("Run", number=False), Column("GFLOPs", "per clip"), Column("Top-1", "%")]
    columns += [Column("More GFLOPs", "%"), Column("More top-1", "points")]
    rows = []
    for place, index in enumerate(front):
        entry, before = entries[index], entries[front[place - 1]] if place else None
        more = None if before is None else 100 * (entry.gflops.mean / before.gflops.mean - 1)
        gain = None if before is None else entry.top1.mean - before.top1.mean
        rows.append(
            [
                Cell(str(index + 1), index + 1), Cell(entry.label), number_cell(entry.gflops, ".4g"), number_cell(entry.top1, ".2f"),
                Cell("–" if more is None else f"+{more:.0f}", more), Cell("–" if gain is None else f"+{gain:.2f}", gain),
            ]
        )
    return Table(columns, rows)


def class_table(found: Mapping[int, Mapping[str, ClassTotals]], entries: Sequence[Entry]) -> Table:
    """Accuracy of each class and, where the clip decides on it, its cost.

    Args:
        found: the classes by the index of an entry, summed over its seeds.
    """
    shown = sorted(found)
    columns = [Column("Class", number=False), Column("Clips", help="of one test; of each run where they differ")]
    for index in shown:
        columns += [Column(f"#{index + 1}", "% right"), *([Column(f"#{index + 1}", "GFLOPs")] if entries[index].kind == "adaptive" else [])]
    highest = max(one.gflops / one.clips for totals in found.values() for one in totals.values()) or 1.0
    rows = []
    for name in sorted({name for totals in found.values() for name in totals}):
        clips = [found[index][name].clips // len(entries[index].runs) if name in found[index] else 0 for index in shown]
        cells = [Cell(one_line(name)), Cell(str(clips[0]) if len(set(clips)) == 1 else " / ".join(map(str, clips)), max(clips))]
        for index in shown:
            one, adaptive = found[index].get(name), entries[index].kind == "adaptive"
            if one is None:
                cells += [Cell("–")] * (1 + adaptive)
                continue
            right, gflops = 100 * one.right / one.clips, one.gflops / one.clips
            cells += [Cell(f"{right:.1f}", right), *([Cell(f"{gflops:.4g}", gflops, bar=100 * gflops / highest)] if adaptive else [])]
        rows.append(cells)
    return Table(columns, rows, name="classes", scrolls=True)


def untested_table(runs: Sequence[Run]) -> Table | None:
    rows = [[Cell(label, small=one_line(run.name) if run.config else ""), Cell(one_line(run.reason))] for label, run in untested(runs)]
    return Table([Column("Run", number=False), Column("Why it has no results", number=False)], rows) if rows else None
