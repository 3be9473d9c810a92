"""Pictures of a validation: the confusion matrix, the accuracy of each class, and the accuracy by B'.

They are drawn with Pillow, with a font of matplotlib, which would take a second for the three of them after each epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from atfr.utils.printable import shortened
from atfr.viz.colors import COLORS, DARK, GREY

MOST_NAMED = 60  # classes of a confusion matrix with their names beside it
MOST_COUNTED = 20  # classes of a confusion matrix with numbers in its cells
MOST_BARS = 40  # classes with a bar each; of more, the worst and the best half of so many are shown
LISTED = 24  # most frequent confusions that are listed beside a matrix without names
LETTERS = 26  # of a class name
TITLE, TEXT = 18, 15  # height of letters, in pixels
GAP = 16  # pixels between the parts of a picture
SHADES = np.array([[247, 251, 255], [107, 174, 214], [8, 48, 107]])  # of a share of 0, 1/4 and 1


class _Sheet:
    """A white picture to draw on, in pixels from the top left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.image = Image.new("RGB", (round(width), round(height)), "white")
        self.draw = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, text: str, *, anchor: str = "lm", size: int = TEXT, bold: bool = False, color: str = DARK) -> None:
        """Write a line; `anchor` says which point of it is at (x, y), as in Pillow."""
        self.draw.text((x, y), text, fill=color, font=_font(size, bold), anchor=anchor)

    def upright(self, x: float, y: float, text: str, *, anchor: str, size: int = TEXT, bold: bool = False) -> None:
        """Write a line from the bottom to the top, centred at x; it begins (`anchor` b), is centred (m) or ends (t) at y."""
        length, height = round(_length(text, size, bold)) + 2, round(1.4 * size)
        line = _Sheet(length, height)
        line.text(1, height / 2, text, size=size, bold=bold)
        top = {"b": y - length, "m": y - length / 2, "t": y}[anchor]
        self.image.paste(line.image.rotate(90, expand=True), (round(x - height / 2), round(top)))

    def box(self, left: float, top: float, right: float, bottom: float, color: str) -> None:
        """Fill a rectangle; one that rounds to no pixel is not drawn."""
        x, y, end_x, end_y = map(round, (left, top, right, bottom))
        if end_x > x and end_y > y:
            self.draw.rectangle((x, y, end_x - 1, end_y - 1), fill=color)


def confusion_picture(counts: np.ndarray, class_names: Sequence[str]) -> Image.Image:
    """Draw a confusion matrix. The colour of a cell is its share of the clips of its class.

    Up to 60 classes are named at the axes. Of more, the most frequent confusions are listed beside the matrix.

    Args:
        counts: [classes, classes] clips of each class (row) with each prediction (column).
    """
    classes = len(class_names)
    cell = 46 if classes <= 12 else max(2, min(46, 920 // classes))  # pixels
    named, size = classes <= MOST_NAMED, cell * classes
    small = min(TEXT, cell - 2) if named else TEXT
    names = [shortened(name, LETTERS) for name in class_names]
    labels = dict(enumerate(names)) if named else {number: str(number) for number in range(0, classes, _step(classes, 60 / cell))}
    lines = [] if named else _confusions(counts, names)
    beside = 100 if classes > MOST_COUNTED else 0  # for the scale of colours
    margin = 40 + max(_length(label, small) for label in labels.values())
    top, left = 70, GAP + margin
    found = f"{classes} classes, {counts.sum():,} clips, {100 * np.trace(counts) / max(counts.sum(), 1):.1f} % correct (the diagonal)"
    width = max(left + size + beside + max((_length(line) + GAP for line in lines), default=0), GAP + _length(found)) + GAP
    sheet = _Sheet(width, max(top + size + margin + GAP, top + 24 * len(lines)))
    sheet.text(GAP, 24, "Confusion matrix", size=TITLE, bold=True)
    sheet.text(GAP, 48, found)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    sheet.image.paste(Image.fromarray(_shades(shares)).resize((size, size), Image.Resampling.NEAREST), (round(left), top))
    sheet.draw.rectangle((round(left) - 1, top - 1, round(left) + size, top + size), outline=DARK)
    for number, label in labels.items():
        at = (number + 0.5) * cell
        sheet.text(left - 8, top + at, label, anchor="rm", size=small)
        sheet.upright(left + at, top + size + 8, label, anchor="t", size=small)
    sheet.upright(GAP + 10, top + size / 2, "class", anchor="m", bold=True)
    sheet.text(left + size / 2, top + size + margin - 12, "prediction", anchor="mm", bold=True)
    if classes <= MOST_COUNTED:
        for row, column in np.argwhere(counts).tolist():
            color = "white" if shares[row, column] > 0.3 else DARK
            sheet.text(left + (column + 0.5) * cell, top + (row + 0.5) * cell, str(counts[row, column]), anchor="mm", color=color)
    else:
        _add_scale(sheet, left + size + GAP, top, size)
    for number, line in enumerate(lines):
        sheet.text(left + size + beside + GAP, top + 10 + 24 * number, line, bold=number == 0)
    return sheet.image


def _add_scale(sheet: _Sheet, left: float, top: int, size: int) -> None:
    """Draw which colour of a confusion matrix is which share."""
    shades = _shades(np.linspace(1, 0, 256)[:, None] ** 2)
    sheet.image.paste(Image.fromarray(shades).resize((18, size)), (round(left), top))
    for percent in (0, 1, 5, 20, 50, 100):
        sheet.text(left + 24, top + size * (1 - (percent / 100) ** 0.5), str(percent))
    sheet.upright(left + 72, top + size / 2, "% of the clips of the class", anchor="m")


def _shades(shares: np.ndarray) -> np.ndarray:
    """Return the colours [..., 3] uint8 of shares from 0 to 1. Small ones are well apart."""
    return np.stack([np.interp(shares**0.5, (0, 0.5, 1), channel) for channel in SHADES.T], axis=-1).astype(np.uint8)


def _confusions(counts: np.ndarray, names: Sequence[str]) -> list[str]:
    """The most frequent confusions, one a line, below a title."""
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:LISTED]
    pairs = [(row, column) for row, column in zip(*(index.tolist() for index in np.unravel_index(order, wrong.shape))) if wrong[row, column]]
    lines = [f"{wrong[row, column]} of {counts[row].sum()}   {names[row]}  →  {names[column]}" for row, column in pairs]
    return ["Most frequent confusions (class → prediction)", *lines]


def class_accuracy_picture(counts: np.ndarray, class_names: Sequence[str]) -> Image.Image:
    """Draw the accuracy of each class that has clips, from the worst to the best; of many classes, the worst and the best.

    Args:
        counts: as in `confusion_picture`.
    """
    totals, right = counts.sum(axis=1), np.diag(counts)
    present = np.flatnonzero(totals)
    accuracy = {number: 100 * right[number] / totals[number] for number in present.tolist()}
    order, mean = sorted(accuracy, key=accuracy.__getitem__), sum(accuracy.values()) / len(accuracy)
    columns, titles = [order], ["Accuracy of each class"]
    if len(order) > MOST_BARS:
        columns = [order[: MOST_BARS // 2], order[-(MOST_BARS // 2) :]]
        titles = [f"The {len(column)} {which} of {len(order)} classes" for column, which in zip(columns, ("worst", "best"))]
    names = {number: f"{shortened(class_names[number], LETTERS)}  ({right[number]} of {totals[number]})" for number in order}
    margin, full, row = GAP + max(map(_length, names.values())), 400, 28  # of the names, of a bar of 100 %, from bar to bar
    each, bottom = margin + full + 3 * GAP, 50 + row * max(map(len, columns))
    sheet = _Sheet(each * len(columns), bottom + 60)
    for place, (column, title) in enumerate(zip(columns, titles)):
        left = place * each + margin + 8
        sheet.text(place * each + GAP, 24, title, size=TITLE, bold=True)
        for percent in range(0, 101, 20):
            sheet.box(round(left + full * percent / 100), 46, round(left + full * percent / 100) + 1, bottom, GREY)
            sheet.text(left + full * percent / 100, bottom + 14, str(percent), anchor="mm")
        sheet.text(left + full / 2, bottom + 40, f"% correct (line: mean of the classes, {mean:.1f})", anchor="mm")
        sheet.box(left + full * mean / 100 - 1, 46, left + full * mean / 100 + 1, bottom, COLORS[1])
        for number, at in zip(column, range(50, bottom, row)):
            sheet.text(left - 8, at + row / 2, names[number], anchor="rm")
            sheet.box(left, at + 4, left + full * accuracy[number] / 100, at + row - 4, COLORS[0])
    return sheet.image


def accuracy_by_bins_picture(right: Sequence[np.ndarray], total: Sequence[np.ndarray], layers: Sequence[str]) -> Image.Image:
    """Draw the accuracy of the clips of each B', with their number above the bar; one row for each layer.

    Args:
        right, total: for each layer, clips [T + 1] by B': those with the right prediction, and all.
    """
    sheets = [_accuracy_by_bins(good, clips, f" after {layer}" if len(layers) > 1 else "") for good, clips, layer in zip(right, total, layers)]
    whole = _Sheet(max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets))
    for number, sheet in enumerate(sheets):
        whole.image.paste(sheet, (0, sum(before.height for before in sheets[:number])))
    return whole.image


def _accuracy_by_bins(right: np.ndarray, total: np.ndarray, where: str) -> Image.Image:
    frames, mean = len(total) - 1, 100 * right.sum() / total.sum()
    numbers = {kept: f"{total[kept]:,}" for kept in np.flatnonzero(total).tolist()}
    longest = max(map(_length, numbers.values()))
    step = min(max(920 / frames, 20), 44)  # from bar to bar
    is_upright = longest > step - 4
    left, full = 90, 220  # of the bars, and the height of 100 %
    top = 56 + (longest + 14 if is_upright else 30)
    title = f"Accuracy by B' (line: all clips, {mean:.1f} %)"
    below = f"B', the features that a clip keeps of {frames}{where}"
    sheet = _Sheet(max(left + step * frames, GAP + _length(title, TITLE, bold=True), left + _length(below)) + GAP, top + full + 70)
    sheet.text(GAP, 24, title, size=TITLE, bold=True)
    sheet.text(left - 8, top - 22, "clips", anchor="rm")
    end = left + step * frames
    for percent in range(0, 101, 25):
        at = top + full * (1 - percent / 100)
        sheet.box(left, round(at), end, round(at) + 1, GREY)
        sheet.text(left - 8, at, str(percent), anchor="rm")
    sheet.upright(GAP + 10, top + full / 2, "% correct", anchor="m")
    sheet.box(left, top + full * (1 - mean / 100) - 1, end, top + full * (1 - mean / 100) + 1, COLORS[1])
    for kept, number in numbers.items():
        x = left + (kept - 0.5) * step
        sheet.box(x - 0.4 * step, top + full * (1 - right[kept] / total[kept]), x + 0.4 * step, top + full, COLORS[0])
        if is_upright:
            sheet.upright(x, top - 10, number, anchor="b")
        else:
            sheet.text(x, top - 22, number, anchor="mm")
    every = _step(frames, (_length(str(frames)) + 6) / step)
    for kept in [1, *range(every, frames + 1, every)] if every > 1 else range(1, frames + 1):
        sheet.text(left + (kept - 0.5) * step, top + full + 14, str(kept), anchor="mm")
    sheet.text(left, top + full + 42, below)
    return sheet.image


def _step(count: int, least: float) -> int:
    """Return the distance of labels for `count` places: a round number that is at least `least`."""
    return next((step for step in (1, 2, 4, 5, 10, 20, 50, 100, 200, 500) if step >= least), count)


@lru_cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The font of the other pictures, which comes with matplotlib."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"DejaVuSans{'-Bold' if bold else ''}.ttf")), size)


def _length(text: str, size: int = TEXT, bold: bool = False) -> float:
    """The length of a line, in pixels."""
    return _font(size, bold).getlength(text)
