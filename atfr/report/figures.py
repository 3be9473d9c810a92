"""Draw the figures of a report as SVG with text as text, to be put into the page. Lines and letters take the colours of the page."""

from __future__ import annotations

import hashlib
import html
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from atfr.report.compare import Estimate, pareto
from atfr.report.runs import Bins, ClassTotals, Points
from atfr.viz.colors import COLORS, DARK, GREY

ADAPTIVE = tuple(color for number, color in enumerate(COLORS) if number != 1)
FIXED_COLOR = COLORS[1]
FIXED_MARKERS = {"uniform": "^", "stride": "v", "random": "D", "atfr-equal": "P", "glance-equal": "X"}
PAGE = "#ffffff"  # stands for the background of the page
ON_BAR = "#fefefe"  # letters on a bar, light on every page
MOST_POINTS = 200  # of a curve
MOST_NAMED = 12  # points of a figure with a name; of more points, or with longer names, only the numbers are shown
MOST_CLASSES = 24  # of the figure
LONGEST = 30  # letters of a name in a figure
_FONT: Any = {"font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 10, "svg.fonttype": "none"}


@dataclass(frozen=True)
class Mark:
    """A run in a figure of accuracy against cost."""

    number: int
    label: str
    method: str
    kind: str
    cost: Estimate
    top1: Estimate


def scatter(marks: Sequence[Mark], *, x_label: str, unit: str, dense: float | None = None) -> str:
    """Draw accuracy against cost: a labelled point for each run, and the runs that none beats in both.

    Args:
        unit: of the cost, for the text that appears when the pointer is on a point.
        dense: the cost of the dense network, if all runs have the same: an axis at the top shows the cost as a share of it.
    """
    figure, axis = _figure(4.4, 4.2)
    front = pareto([(mark.cost.mean, mark.top1.mean) for mark in marks])
    costs, accuracies = np.array([mark.cost.mean for mark in marks]), np.array([mark.top1.mean for mark in marks])
    if len(front) > 1:
        band: Any = {"color": COLORS[2], "linewidth": 5, "alpha": 0.35, "solid_capstyle": "round", "zorder": 1}
        axis.plot(costs[front], accuracies[front], label="best for their cost (Pareto front)", **band)
    methods = list(dict.fromkeys(mark.method for mark in sorted(marks, key=lambda mark: ("adaptive", "dense", "fixed").index(mark.kind))))
    adaptive = [name for name in methods if any(mark.method == name and mark.kind == "adaptive" for mark in marks)]
    for name in methods:
        own = [mark for mark in marks if mark.method == name]
        color, marker = _symbol(name, own[0].kind, adaptive)
        label = {"adaptive": f"{name}: B' follows the clip", "fixed": f"{name}: the same B' for all clips", "dense": f"{name}: all features"}[own[0].kind]
        axis.plot([], [], linestyle="", marker=marker, color=color, markersize=7, label=label)
        for mark in own:
            if mark.top1.error is not None:
                axis.errorbar(mark.cost.mean, mark.top1.mean, xerr=mark.cost.error, yerr=mark.top1.error, color=color, linewidth=1, capsize=2, zorder=2)
            point = axis.plot(mark.cost.mean, mark.top1.mean, marker, color=color, markersize=8, markeredgecolor=PAGE, markeredgewidth=0.8, zorder=3)[0]
            point.set_gid(f"run-{mark.number}")
    axis.set_xlabel(x_label)
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.yaxis.set_major_locator(MaxNLocator(7))
    axis.set_ylabel("top-1 accuracy of the test, %")
    axis.margins(0.14, 0.12)
    axis.set_xlim(left=max(0.0, axis.get_xlim()[0]))
    axis.set_ylim(max(0.0, axis.get_ylim()[0]), min(axis.get_ylim()[1], 103.0))
    axis.grid(color=GREY, linewidth=0.6)
    axis.set_axisbelow(True)
    if dense is not None:
        top = axis.secondary_xaxis("top", functions=(_scaled(100 / dense), _scaled(dense / 100)))
        top.set_xlabel("% of the dense network")
        _quiet(top)
    legend = figure.legend(loc="lower left", bbox_to_anchor=(0.13, 0), fontsize=9, frameon=False, handletextpad=0.6, labelspacing=0.3)
    _plain(legend.get_texts())
    bottom = 0.135 + 0.044 * len(legend.get_texts())
    figure.subplots_adjust(left=0.16, right=0.97, top=0.88 if dense is not None else 0.97, bottom=bottom)
    _label(axis, marks, [marks[index] for index in front])
    tips = {f"run-{mark.number}": f"{mark.number} {mark.label}: top-1 {_text(mark.top1)} %, {_text(mark.cost)} {unit}" for mark in marks}
    return _svg(figure, f"top-1 accuracy against {x_label}", tips)


def histogram(bins: Sequence[Bins], name: str) -> str:
    """Draw the share of clips with each B', summed over runs of the same experiment, with a line at the mean."""
    figure, axis = _figure(2.7, 1.5)
    frames = max(one.frames for one in bins)
    counts = np.array([sum(one.histogram.get(kept, 0) for one in bins) for kept in range(1, frames + 1)], dtype=float)
    shares = 100 * counts / max(counts.sum(), 1)
    mean = float((np.arange(1, frames + 1) * shares).sum() / 100)
    axis.bar(np.arange(1, frames + 1), shares, width=0.85, color=COLORS[0])
    axis.axvline(mean, color=DARK, linewidth=1)
    left = mean > frames * 0.6
    beside: Any = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top", "fontsize": 9, "color": DARK}
    axis.annotate(f"mean {mean:.1f}", (mean, 1), (-4 if left else 4, -2), ha="right" if left else "left", **beside)
    axis.set_xlim(0.4, frames + 0.6)
    axis.set_ylim(0, max(shares.max() * 1.3, 1))
    axis.set_xticks(sorted({1, frames // 2, frames} - {0}))
    axis.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    axis.set_xlabel(f"B': features kept of {frames}", fontsize=9)
    axis.set_ylabel("% of clips", fontsize=9)
    figure.subplots_adjust(left=0.17, right=0.97, top=0.96, bottom=0.3)
    return _svg(figure, f"B' of the clips, {name}")


def curves(loss: Sequence[Points], top1: Sequence[Points], limits: tuple[float, float, float], name: str) -> str:
    """Draw training loss and validation top-1, a line for each seed.

    Args:
        limits: of all runs, so that they can be compared: the lowest and the highest loss, and the highest top-1.
    """
    figure = Figure(figsize=(3.7, 1.6))
    with matplotlib.rc_context(_FONT):
        left, right = figure.subplots(1, 2)
    for axis, lines, color, title in ((left, loss, COLORS[3], "training loss"), (right, top1, COLORS[0], "validation top-1, %")):
        _quiet(axis)
        for points in lines:
            steps, values = np.array(_thinned(points)).reshape(-1, 2).T
            axis.plot(steps, values, color=color, linewidth=1.2, marker="." if len(steps) < 8 else None, markersize=5)
        axis.set_xlim(0, max([1, *(step for points in lines for step, _ in points)]) * 1.03)
        axis.set_title(title, fontsize=9, color=DARK)
        axis.set_xlabel("step", fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(4))
        axis.grid(color=GREY, linewidth=0.5)
    low, high, best = limits
    left.set_ylim(max(0.0, low - 0.05 * (high - low)) if high > low else 0, high + 0.05 * max(high - low, 0.1))
    right.set_ylim(0, min(100.0, best * 1.1) or 100.0)
    figure.subplots_adjust(left=0.13, right=0.98, top=0.86, bottom=0.28, wspace=0.32)
    return _svg(figure, f"training loss and validation top-1, {name}")


def class_costs(totals: Mapping[str, ClassTotals], *, dense: float) -> str:
    """Draw the mean GFLOPs of each class's clips as bars, the dearest at the top. Of many classes, both ends are shown."""
    ranked = sorted(totals, key=lambda name: -totals[name].gflops / totals[name].clips)
    cut = len(ranked) > MOST_CLASSES
    shown = [*ranked[: MOST_CLASSES // 2], *ranked[-MOST_CLASSES // 2 :]] if cut else ranked
    at = np.arange(len(shown)) + np.where(np.arange(len(shown)) >= MOST_CLASSES // 2, 1, 0) * cut
    inches = 0.9 + 0.21 * (len(shown) + cut)
    figure, axis = _figure(4.6, inches)
    costs = [totals[name].gflops / totals[name].clips for name in shown]
    axis.barh(at, costs, height=0.7, color=COLORS[0])
    axis.axvline(dense, color=DARK, linewidth=1)
    axis.annotate("dense", (dense, 1), (-3, 2), xycoords=("data", "axes fraction"), textcoords="offset points", ha="right", va="bottom", fontsize=9, color=DARK)
    beside: Any = {"textcoords": "offset points", "va": "center", "fontsize": 9}
    for row, cost in zip(at, costs):
        inside = cost > 0.3 * dense
        axis.annotate(f"{cost:.3g}", (cost, row), (-4 if inside else 4, 0), ha="right" if inside else "left", color=ON_BAR if inside else DARK, **beside)
    if cut:
        axis.annotate(f"... {len(ranked) - len(shown)} more classes ...", (0, MOST_CLASSES // 2), (4, 0), color=DARK, **beside)
    axis.set_yticks(at, [_short(name) for name in shown])
    _plain(axis.get_yticklabels())
    axis.set_ylim(at[-1] + 0.6, -0.6)
    axis.set_xlim(0, max(dense, max(costs)) * 1.08)
    axis.set_xlabel("GFLOPs of a clip, mean of the class")
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.tick_params(axis="y", length=0)
    figure.subplots_adjust(left=min(0.46, 0.04 + 0.0165 * max(len(_short(name)) for name in shown)), right=0.95, top=1 - 0.25 / inches, bottom=0.5 / inches)
    return _svg(figure, "GFLOPs by class")


def _scaled(factor: float) -> Any:
    return lambda values: np.asarray(values) * factor


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    with matplotlib.rc_context(_FONT):
        axis = figure.subplots()
    _quiet(axis)
    return figure, axis


def _quiet(axis: Any) -> None:
    for name, spine in axis.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(GREY)
    axis.tick_params(colors=DARK, labelsize=9, color=GREY)
    axis.set_facecolor("none")
    for label in (axis.xaxis.label, axis.yaxis.label):
        label.set_color(DARK)


def _symbol(name: str, kind: str, adaptive: Sequence[str]) -> tuple[str, str]:
    if kind == "dense":
        return DARK, "s"
    if kind == "fixed":
        return FIXED_COLOR, FIXED_MARKERS.get(name, "^")
    return ADAPTIVE[adaptive.index(name) % len(ADAPTIVE)], "o"


def _label(axis: Axes, marks: Sequence[Mark], line: Sequence[Mark]) -> None:
    """Write a label beside each point, where it covers as little as possible of the points, of the other labels and of a line."""
    named = len(marks) <= MOST_NAMED and max(len(mark.label) for mark in marks) <= LONGEST
    size = 9
    to_points = 72 / axis.figure.dpi
    frame = axis.get_window_extent()
    left, bottom, right, top = (value * to_points for value in (frame.x0, frame.y0, frame.x1, frame.y1))
    points = [tuple(axis.transData.transform((mark.cost.mean, mark.top1.mean)) * to_points) for mark in marks]
    taken: list[tuple[float, float, float, float]] = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    around = [(x - 10, y - 7, x + 10, y + 7) for x, y in points]  # where a label would seem to be that point's
    for mark, (x, y) in zip(marks, points):
        if mark.top1.error is not None:
            wide, tall = (axis.transData.transform((mark.cost.mean + (mark.cost.error or 0), mark.top1.mean + mark.top1.error)) * to_points) - (x, y)
            taken += [(x - wide, y - 2, x + wide, y + 2), (x - 2, y - tall, x + 2, y + tall)]
    corners = [axis.transData.transform((mark.cost.mean, mark.top1.mean)) * to_points for mark in line]
    for one, two in zip(corners, corners[1:]):
        taken += [(x - 2, y - 2, x + 2, y + 2) for x, y in np.linspace(one, two, int(np.hypot(*(two - one)) / 4) + 2)]
    for at, (mark, (x, y)) in enumerate(zip(marks, points)):
        text = f"{mark.number} {mark.label}" if named else str(mark.number)
        wide, tall = 0.56 * size * len(text), 1.15 * size
        places = []
        for distance in (7, 16, 28, 42):
            flat = 0.3 * distance
            places += [(x + distance, y - tall / 2), (x - distance - wide, y - tall / 2), (x - wide / 2, y + distance - 1), (x - wide / 2, y - distance - tall + 1)]
            places += [(x + flat, y + distance), (x - flat - wide, y + distance), (x + flat, y - distance - tall), (x - flat - wide, y - distance - tall)]
        boxes = [(px, py, px + wide, py + tall) for px, py in places]
        others = [*taken, *around[:at], *around[at + 1 :]]
        costs = [sum(_overlap(box, other) for other in others) + 3 * _outside(box, (left, bottom, right, top)) + 0.5 * number for number, box in enumerate(boxes)]
        box = boxes[int(np.argmin(costs))]
        taken.append(box)
        text_x, text_y = box[0] - x, box[1] - y
        point = (mark.cost.mean, mark.top1.mean)
        note = axis.annotate(text, point, (text_x, text_y + 0.2 * size), textcoords="offset points", fontsize=size, color=DARK, parse_math=False, zorder=4)
        if min(abs(text_x), abs(text_x + wide)) > 12 and not box[0] <= x <= box[2] or abs(text_y + tall / 2) > 18:
            end = (min(max(x, box[0]), box[2]) - x, (box[1] if text_y > 0 else box[3]) - y)
            axis.annotate("", point, end, textcoords="offset points", arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.8}, zorder=2)
        note.set_gid(f"run-{mark.number}")


def _overlap(one: tuple[float, float, float, float], two: tuple[float, float, float, float]) -> float:
    wide, tall = min(one[2], two[2]) - max(one[0], two[0]), min(one[3], two[3]) - max(one[1], two[1])
    return max(wide, 0.0) * max(tall, 0.0)


def _outside(box: tuple[float, float, float, float], frame: tuple[float, float, float, float]) -> float:
    """The area of a box that is outside the frame."""
    return (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, frame)


def _thinned(points: Points) -> Points:
    every = -(-len(points) // MOST_POINTS) or 1
    return points[::every] + points[-1:] if (len(points) - 1) % every else points[::every]


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def _text(value: Estimate) -> str:
    return f"{value.mean:.4g}" + (f" ± {value.error:.2g}" if value.error is not None else "")


def _plain(texts: Sequence) -> None:
    for text in texts:
        text.set_parse_math(False)  # a $ in a name is no formula
        text.set_color(DARK)


def _svg(figure: Figure, name: str, tips: Mapping[str, str] | None = None) -> str:
    """Render a figure.

    Args:
        name: what it shows, for screen readers.
        tips: text that appears when the pointer is on the parts with these ids.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({**_FONT, "svg.hashsalt": "atfr"}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about letters that the font lacks: the browser has its own
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    opening = f'<svg role="img" aria-label="{html.escape(name)}" {box[0]} style="max-width: {120 * figure.get_figwidth():.0f}px">'
    text = opening + text[text.index(">", box.end()) + 1 :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", text, flags=re.S)
    for colour, of_page in ((DARK, "currentColor"), (GREY, "var(--line)"), (PAGE, "var(--page)")):
        text = text.replace(colour, of_page)
    for gid, tip in (tips or {}).items():
        text = text.replace(f'<g id="{gid}">', f"<g><title>{html.escape(tip)}</title>")
    # Ids are unique in the page, and only where something refers to them.
    referenced, unique = set(re.findall(r"#(\w+)", text)), hashlib.sha256(text.encode()).hexdigest()[:8]
    text = re.sub(r' id="([^"]*)"', lambda found: f' id="{found[1]}-{unique}"' if found[1] in referenced else "", text)
    text = re.sub(r'(href="#|url\(#)(\w+)', rf"\1\2-{unique}", text)
    return re.sub(r">\s+<", ">\n<", text)
