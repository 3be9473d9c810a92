"""Render a report as one HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import jinja2
from markupsafe import Markup

from atfr.report import figures
from atfr.report.compare import OF_THE_CLIP, Entry, entries_of, pareto, protocol, untested
from atfr.report.examples import Example, read_examples
from atfr.report.runs import ClassTotals, Results, Run, class_totals
from atfr.report.tables import Cell, Column, Table, class_table, front_table, main_table, seed_table, text_of, untested_table
from atfr.utils.printable import one_line, printable

MOST_CLASS_COLUMNS = 6  # runs in the table of classes
MOST_WITH_EXAMPLES = 4  # runs whose examples are shown
MOST_EXAMPLES = 2  # of each kind of a run
CLOSE = 1.0  # percentage points of top-1 that count as almost as good


@dataclass(frozen=True)
class Panel:
    """A small figure of one row of the main table."""

    number: int  # 0: of a run that is not in it
    label: str
    svg: Markup


@dataclass
class Page:
    """What the template shows."""

    title: str
    made: str
    tested: int
    answers: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    main: Table | None = None
    seeds: Table | None = None
    scatters: list[Markup] = field(default_factory=list)
    front: Table | None = None
    histograms: list[Panel] = field(default_factory=list)
    classes: Table | None = None
    classes_note: str = ""
    class_figure: Panel | None = None
    examples: list[tuple[int, str, list[Example]]] = field(default_factory=list)
    examples_note: str = ""
    curves: list[Panel] = field(default_factory=list)
    untested: Table | None = None
    notes: list[tuple[str, str]] = field(default_factory=list)
    same_protocol: list[tuple[str, str]] = field(default_factory=list)
    protocols: Table | None = None
    configs: list[tuple[int, str, str, str]] = field(default_factory=list)  # number, label, folder, text


def render(runs: Sequence[Run]) -> str:
    """Return the page about these runs. It needs no other file and no network."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("atfr.report"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style, script = (Markup(environment.get_template(name).render()) for name in ("report.css", "report.js"))  # ours, without values of a run
    return printable(environment.get_template("report.html").render(page=page_of(runs), style=style, script=script))


def page_of(runs: Sequence[Run]) -> Page:
    """Compute what the page shows."""
    entries = entries_of(runs)
    tested = sum(len(entry.runs) for entry in entries)
    page = Page(title="atfr report", made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"), tested=tested)
    page.notes = [(one_line(run.name), one_line(note)) for run in runs for note in run.notes]
    page.untested = untested_table(runs)
    page.curves = _curves(entries, runs)
    if not entries:
        return page
    page.main = main_table(entries)
    page.seeds = seed_table(entries) if tested > len(entries) else None
    page.scatters = _scatters(entries) if len(entries) > 1 else []
    front = pareto([(entry.gflops.mean, entry.top1.mean) for entry in entries])
    page.front = front_table(entries, front) if len(front) > 1 else None
    page.histograms = [_panel(number, entry, figures.histogram([r.bins[0] for r in entry.results], f"{number} {entry.label}")) for number, entry in _adaptive(entries)]
    totals = _add_classes(page, entries, front)
    _add_examples(page, entries)
    _add_protocols(page, entries)
    page.answers = _answers(entries, totals)
    page.configs = [
        (number, entry.label, one_line(str(entry.runs[0].folder)), printable(entry.runs[0].config_text))
        for number, entry in enumerate(entries, start=1)
        if entry.runs[0].config_text
    ]
    return page


def _panel(number: int, entry: Entry, svg: str) -> Panel:
    return Panel(number, entry.label, Markup(svg))


def _adaptive(entries: Sequence[Entry]) -> list[tuple[int, Entry]]:
    """The numbered entries whose B' follows the clip."""
    return [(number, entry) for number, entry in enumerate(entries, start=1) if entry.kind == "adaptive" and all(r.bins for r in entry.results)]


def _scatters(entries: Sequence[Entry]) -> list[Markup]:
    numbered = list(enumerate(entries, start=1))
    dense = {results.dense_gflops for entry in entries for results in entry.results}
    marks = [figures.Mark(number, entry.label, entry.method, entry.kind, entry.gflops, entry.top1) for number, entry in numbered]
    found = [figures.scatter(marks, x_label="GFLOPs of a clip (mean)", unit="GFLOPs", dense=dense.pop() if len(dense) == 1 else None)]
    timed = [figures.Mark(n, entry.label, entry.method, entry.kind, entry.milliseconds, entry.top1) for n, entry in numbered if entry.milliseconds]
    if timed:
        found.append(figures.scatter(timed, x_label="measured time of a clip in the network, ms", unit="ms"))
    return [Markup(svg) for svg in found]


def _add_classes(page: Page, entries: Sequence[Entry], front: Sequence[int]) -> tuple[int, dict[str, ClassTotals]] | None:
    """Add the classes to the page. Returns the number and the classes of the most accurate adaptive entry."""
    order = list(dict.fromkeys([*sorted(front), *range(len(entries))]))
    order.sort(key=lambda index: index not in front)
    best_adaptive = next((index for index in range(len(entries)) if entries[index].kind == "adaptive"), None)
    if best_adaptive is not None:
        order = [best_adaptive, *(index for index in order if index != best_adaptive)]
    found: dict[int, dict[str, ClassTotals]] = {}
    for index in order:
        if len(found) == MOST_CLASS_COLUMNS:
            break
        try:
            totals = _sum_classes([class_totals(run.folder) for run in entries[index].runs if run.budget is None])
        except ValueError as error:
            page.notes.append((one_line(entries[index].runs[0].name), one_line(str(error))))
            continue
        if totals:
            found[index] = totals
    if not found:
        return None
    page.classes = class_table(found, entries)
    if len(found) < len(entries):
        page.classes_note = f"{len(found)} of {len(entries)} runs are shown, those that are best for their cost first; give fewer runs to see others."
    if best_adaptive not in found or best_adaptive is None:
        return None
    dense = entries[best_adaptive].results[0].dense_gflops
    named = {one_line(name): one for name, one in found[best_adaptive].items()}
    page.class_figure = _panel(best_adaptive + 1, entries[best_adaptive], figures.class_costs(named, dense=dense))
    return best_adaptive + 1, found[best_adaptive]


def _sum_classes(parts: Sequence[Mapping[str, ClassTotals]]) -> dict[str, ClassTotals]:
    """Add up the totals of several seeds."""
    whole: dict[str, ClassTotals] = {}
    for part in parts:
        for name, one in part.items():
            total = whole.setdefault(name, ClassTotals())
            total.clips += one.clips
            total.right += one.right
            total.gflops += one.gflops
            total.bins += one.bins
    return whole


def _add_examples(page: Page, entries: Sequence[Entry]) -> None:
    with_examples = 0
    for number, entry in enumerate(entries, start=1):
        found, note = read_examples(entry.runs[0].folder)
        if note:
            page.notes.append((one_line(entry.runs[0].name), note))
        with_examples += bool(found)
        if found and len(page.examples) < MOST_WITH_EXAMPLES:
            page.examples.append((number, entry.label, _first_of_each_kind(found)))
    if with_examples > len(page.examples):
        page.examples_note = f"The first {len(page.examples)} of {with_examples} runs with examples are shown."


def _first_of_each_kind(examples: Sequence[Example]) -> list[Example]:
    kinds = [example.kind for example in examples]
    return [example for at, example in enumerate(examples) if kinds[:at].count(example.kind) < MOST_EXAMPLES]


def _curves(entries: Sequence[Entry], runs: Sequence[Run]) -> list[Panel]:
    """A panel for each entry, and for each run that is not tested yet."""
    drawn = [(number, entry.label, entry.runs) for number, entry in enumerate(entries, start=1)]
    drawn += [(0, f"{label} (not tested)", (run,)) for label, run in untested(runs)]
    drawn = [(number, label, of) for number, label, of in drawn if any(run.loss for run in of)]
    best = max((value for _, _, of in drawn for run in of for _, value in run.top1), default=0.0)
    tested = sorted(value for entry in entries for run in entry.runs for _, value in run.loss)
    panels = []
    for number, label, of in drawn:
        # The losses of a run that diverged would hide those of the others.
        values = tested or sorted(value for run in of for _, value in run.loss)
        limits = (values[0], values[int(0.99 * (len(values) - 1))], best)
        panels.append(Panel(number, label, Markup(figures.curves([run.loss for run in of], [run.top1 for run in of], limits, f"{number} {label}"))))
    return panels


def _add_protocols(page: Page, entries: Sequence[Entry]) -> None:
    """Add how the runs were tested: what is the same for all, and a table of what is not."""
    protocols = [(number, entry, protocol(results)) for number, entry in enumerate(entries, start=1) for results in entry.results[:1]]
    keys = list(dict.fromkeys(key for _, _, one in protocols for key in one))
    same = [key for key in keys if len({_json(one.get(key)) for _, _, one in protocols}) == 1]
    different = [key for key in keys if key not in same]
    page.same_protocol = [(one_line(key), one_line(_json(protocols[0][2].get(key)))) for key in same]
    matters = [one_line(key) for key in different if key not in OF_THE_CLIP]
    if matters:
        page.warnings.append(f"The runs were not tested in the same way, so their accuracies may not be comparable. See Protocol: {', '.join(matters)}.")
    if any(_chosen_on_test_videos(run) for entry in entries for run in entry.runs):
        page.warnings.append("There is no validation list, so the test videos chose the best epoch: accuracies are optimistic.")
    failed = [f"#{number}: {results.failed}" for number, entry in enumerate(entries, start=1) for results in entry.results if results.failed]
    if failed:
        page.warnings.append(f"Test videos that could not be read are not counted ({', '.join(failed)}).")
    names = ("Run", "Commit", "Tested checkpoint", *map(one_line, different))
    columns = [Column("#"), *(Column(name, number=False) for name in names)]
    rows = []
    for number, entry, one in protocols:
        commits = dict.fromkeys(_commit(results) for results in entry.results)
        checkpoint = str(entry.results[0].protocol.get("checkpoint") or "–")
        if f"/{entry.runs[0].folder.name}/checkpoints/" in checkpoint:
            checkpoint = checkpoint.rpartition("/")[2]  # in the run folder
        own = [Cell(one_line(_json(one.get(key)))) for key in different]
        rows.append([Cell(str(number), number), Cell(entry.label), Cell(", ".join(commits)), Cell(one_line(checkpoint)), *own])
    page.protocols = Table(columns, rows)


def _chosen_on_test_videos(run: Run) -> bool:
    epochs, every = run.config.get("trainer.epochs"), run.config.get("trainer.eval_every")
    several = not (isinstance(epochs, int) and isinstance(every, int)) or epochs > every
    return run.results is not None and run.results.protocol.get("validation") == "test list" and several


def _commit(results: Results) -> str:
    """The commit as recorded, shortened; a + is kept, which marks uncommitted changes."""
    commit = results.protocol.get("commit")
    return one_line(commit[:12] + "+" * commit.endswith("+")) if isinstance(commit, str) else "not recorded"


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _answers(entries: Sequence[Entry], totals: tuple[int, dict[str, ClassTotals]] | None) -> list[tuple[str, str]]:
    """The answers to the three questions, in words."""
    best, videos = entries[0], entries[0].results[0].num_videos
    found = []
    if len(entries) > 1:
        share = max(min(best.top1.mean / 100, 1.0), 0.0)
        chance = 100 * (share * (1 - share) / videos) ** 0.5 if videos else 0.0
        found.append(
            (
                "Most accurate",
                f"#1 {best.label}: top-1 {text_of(best.top1, '.2f')} %, {best.share.mean:.0f} % of the dense GFLOPs."
                f" With {videos} test videos, the standard error of such an accuracy is {chance:.1f} points.",
            )
        )
        cheap = min((entry for entry in entries if entry.top1.mean >= best.top1.mean - CLOSE), key=lambda entry: entry.gflops.mean)
        if cheap is not best:
            number = entries.index(cheap) + 1
            found.append(
                (
                    f"Cheapest within {CLOSE:g} point",
                    f"#{number} {cheap.label}: top-1 {text_of(cheap.top1, '.2f')} %, {100 * cheap.gflops.mean / best.gflops.mean:.0f} % of the GFLOPs of #1.",
                )
            )
        timed = [entry for entry in entries if entry.clips_per_second is not None]
        if timed:
            fastest = max(timed, key=lambda entry: entry.clips_per_second.mean if entry.clips_per_second else 0.0)
            speed, accuracy = text_of(fastest.clips_per_second, ".1f"), text_of(fastest.top1, ".2f")
            found.append(("Fastest", f"#{entries.index(fastest) + 1} {fastest.label}: {speed} clips/s, top-1 {accuracy} %."))
    if totals is not None and len(totals[1]) > 1:
        ranked = sorted(totals[1].items(), key=lambda item: item[1].gflops / item[1].clips)
        (low, cheapest), (high, dearest) = ranked[0], ranked[-1]
        found.append(
            (
                "Expensive clips",
                f"With #{totals[0]}, those of class {one_line(high)} cost most"
                f" ({dearest.gflops / dearest.clips:.3g} GFLOPs, B' {dearest.bins / dearest.clips:.1f} on average),"
                f" those of {one_line(low)} least ({cheapest.gflops / cheapest.clips:.3g}, B' {cheapest.bins / cheapest.clips:.1f}).",
            )
        )
    return found
