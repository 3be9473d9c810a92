"""Pictures of a validation: the confusion matrix, the accuracy of each class, and the accuracy by B'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL.Image import Image

from atfr.viz.clips import shortened
from atfr.viz.merges import COLORS, DARK, GREY, image_of

MOST_NAMED = 60  # classes of a confusion matrix with their names beside it
MOST_COUNTED = 20  # classes of a confusion matrix with numbers in its cells
MOST_BARS = 40  # classes with a bar each; of more, the worst and the best half of so many are shown
LISTED = 24  # most frequent confusions that are listed beside a matrix without names
LETTERS = 26  # of a class name


def confusion_picture(counts: np.ndarray, class_names: Sequence[str]) -> Image:
    """Draw a confusion matrix. The colour of a cell is its share of the clips of its class.

    Up to 60 classes are named at the axes. Of more, the most frequent confusions are listed beside the matrix.

    Args:
        counts: [classes, classes] clips of each class (row) with each prediction (column).
    """
    classes = len(class_names)
    named = classes <= MOST_NAMED
    size = 9.0 if not named else min(max(0.55 * classes, 3.6), 9.0)  # of the matrix, in inches
    letter = min(max(size / classes * 72 * 0.75, 6.0), 11.0)  # height of a name, in points
    names = [shortened(name, LETTERS) for name in class_names]
    margin = 0.75 + (max(map(len, names)) * letter * 0.6 / 72 if named else 0.4)
    right = 0.3 if classes <= MOST_COUNTED else 1.2 if named else 7.2
    bottom = margin - 0.1
    width, height = margin + size + right, 0.75 + size + bottom
    figure = Figure(figsize=(width, height), facecolor="white")
    axis = figure.add_axes((margin / width, bottom / height, size / width, size / height))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axis.imshow(100 * shares, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    if classes > MOST_COUNTED:
        beside = figure.add_axes(((margin + size + 0.15) / width, bottom / height, 0.2 / width, size / height))
        figure.colorbar(image, cax=beside, ticks=[0, 1, 5, 20, 50, 100]).set_label("% of the clips of the class", fontsize=10)
    right_ones, total = int(np.trace(counts)), int(counts.sum())
    figure.text(0.15 / width, 1 - 0.15 / height, "Confusion matrix", fontsize=12, fontweight="bold", color=DARK, va="top")
    found = f"{classes} classes, {total:,} clips, {100 * right_ones / max(total, 1):.1f} % correct (the diagonal)"
    figure.text(0.15 / width, 1 - 0.4 / height, found, fontsize=10, color=DARK, va="top")
    axis.set_xlabel("prediction", fontsize=11, fontweight="bold")
    axis.set_ylabel("class", fontsize=11, fontweight="bold")
    if named:
        axis.set_xticks(range(classes), names, rotation=90, fontsize=letter)
        axis.set_yticks(range(classes), names, fontsize=letter)
    else:
        axis.text(1 + 1.1 / size, 1.0, _listed(counts, class_names), transform=axis.transAxes, fontsize=10, va="top", color=DARK, linespacing=1.5)
    if classes <= MOST_COUNTED:
        for row, column in zip(*np.nonzero(counts)):
            color = "white" if shares[row, column] > 0.3 else DARK
            axis.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=letter, color=color)
    return image_of(figure)


def _listed(counts: np.ndarray, class_names: Sequence[str]) -> str:
    """The most frequent confusions, one a line."""
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:LISTED]
    pairs = [(row, column) for row, column in zip(*np.unravel_index(order, wrong.shape)) if wrong[row, column]]
    names = [shortened(name, LETTERS) for name in class_names]
    lines = [f"{wrong[row, column]} of {counts[row].sum()}   {names[row]}  →  {names[column]}" for row, column in pairs]
    return "\n".join(["Most frequent confusions (clips of the class → prediction)", *lines])


def class_accuracy_picture(counts: np.ndarray, class_names: Sequence[str]) -> Image:
    """Draw the accuracy of each class that has clips, from the worst to the best; of many classes, the worst and the best.

    Args:
        counts: as in `confusion_picture`.
    """
    totals = counts.sum(axis=1)
    present = np.flatnonzero(totals)
    accuracy = 100 * np.diag(counts)[present] / totals[present]
    order = np.argsort(accuracy, kind="stable")
    mean = float(accuracy.mean())
    columns = [order] if len(order) <= MOST_BARS else [order[: MOST_BARS // 2], order[-(MOST_BARS // 2) :]]
    titles = ["Accuracy of each class"]
    if len(columns) == 2:
        titles = [f"The {len(column)} {which} of {len(order)} classes" for column, which in zip(columns, ("worst", "best"))]
    names = [f"{shortened(class_names[number], LETTERS)}  ({counts[number, number]} of {totals[number]})" for number in present.tolist()]
    margin = max(map(len, names)) * 0.085 + 0.2
    width, height = len(columns) * (margin + 4.2), 0.3 * max(map(len, columns)) + 1.1
    figure = Figure(figsize=(width, height), facecolor="white")
    for place, (column, title) in enumerate(zip(columns, titles)):
        axis = figure.add_axes(((place * (margin + 4.2) + margin) / width, 0.55 / height, 3.8 / width, (height - 1.0) / height))
        axis.barh(range(len(column)), accuracy[column], color=COLORS[0], height=0.7)
        axis.axvline(mean, color=COLORS[1], linewidth=1.5, zorder=0.9)
        axis.set_yticks(range(len(column)), [names[at] for at in column], fontsize=10)
        axis.set_ylim(len(column) - 0.4, -0.6)
        axis.set_xlim(0, 100)
        axis.set_xlabel(f"% correct (line: mean of the classes, {mean:.1f})", fontsize=10)
        axis.set_title(title, fontsize=12, fontweight="bold", color=DARK, loc="left", x=-margin / 3.8 * 0.9)
        _tidy(axis, grid="x")
    return image_of(figure)


def accuracy_by_bins_picture(right: Sequence[np.ndarray], total: Sequence[np.ndarray], layers: Sequence[str]) -> Image:
    """Draw the accuracy of the clips of each B', with their number above the bar; one row for each layer.

    Args:
        right, total: for each layer, clips [T + 1] by B': those with the right prediction, and all.
    """
    most = max(len(one) for one in total) - 1
    width, each = min(max(0.42 * most + 1.4, 6.5), 16.0), 3.3
    height = each * len(layers)
    figure = Figure(figsize=(width, height), facecolor="white")
    for row, (good, clips, layer) in enumerate(zip(right, total, layers)):
        axis = figure.add_axes((0.9 / width, (height - each * (row + 1) + 0.65) / height, (width - 1.1) / width, (each - 1.1) / height))
        kept = np.flatnonzero(clips)
        mean = 100 * good.sum() / clips.sum()
        axis.axhline(mean, color=COLORS[1], linewidth=1.5, zorder=0.9)
        axis.bar(kept, 100 * good[kept] / clips[kept], color=COLORS[0], width=0.8)
        upright = most > 40 or clips.max() >= 1000
        for at in kept.tolist():
            axis.text(at, 106, f"{clips[at]:,}", ha="center", va="bottom", fontsize=9, color=DARK, rotation=90 if upright else 0)
        axis.text(-0.012, 106, "clips", ha="right", va="bottom", fontsize=10, color=DARK, transform=axis.get_yaxis_transform())
        axis.set_xlim(0.3, len(clips) - 0.3)
        axis.set_ylim(0, 138 if upright else 120)
        axis.set_yticks([0, 25, 50, 75, 100])
        axis.xaxis.set_major_locator(MaxNLocator(nbins=24, integer=True))
        axis.set_ylabel("% correct", fontsize=11)
        axis.set_xlabel(f"B', the features that a clip keeps of {len(clips) - 1}" + (f" after {layer}" if len(layers) > 1 else ""), fontsize=11)
        axis.set_title(f"Accuracy by B' (line: all clips, {mean:.1f} %)", fontsize=12, fontweight="bold", color=DARK, loc="left")
        _tidy(axis, grid="y")
    return image_of(figure)


def _tidy(axis: Axes, *, grid: Literal["x", "y"]) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.grid(axis=grid, color=GREY, linewidth=0.5)
    axis.set_axisbelow(True)
