"""A picture of what a classifier says of a long video, window after window, and what each window cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from atfr.viz.colors import COLORS, DARK, GREY
from atfr.viz.merges import image_of

MOST_FRAMES = 12  # of the strip
WIDTH = 13.0  # inches


@dataclass(frozen=True)
class Window:
    """A part of a video."""

    start: float  # seconds
    end: float
    label: str
    probability: float
    cost: float  # share of the dense GFLOPs


def timeline_picture(frames: np.ndarray, windows: Sequence[Window]) -> Image.Image:
    """Draw frames of the video, a bar for each stretch of one label, and the cost of each window below.

    Args:
        frames: uint8 [windows, H, W, 3], the middle frame of each window.
    """
    begin, end = windows[0].start, max(windows[-1].end, windows[0].start + 1e-6)
    strip = [round(at) for at in np.linspace(0, len(windows) - 1, min(MOST_FRAMES, len(windows)))]
    tall = WIDTH * 0.84 / len(strip) * frames.shape[1] / frames.shape[2]
    figure = Figure(figsize=(WIDTH, min(tall, 2.5) + 2.3), facecolor="white")
    top, labels, costs = figure.subplots(3, 1, height_ratios=[min(tall, 2.5), 0.7, 1.0])
    figure.subplots_adjust(left=0.1, right=0.94, top=0.97, bottom=0.14, hspace=0.12)
    top.imshow(np.concatenate([frames[at] for at in strip], axis=1), extent=(begin, end, 0, 1), aspect="auto")
    top.axis("off")
    colors = {label: COLORS[number % len(COLORS)] for number, label in enumerate(dict.fromkeys(window.label for window in windows))}
    for first, last, label in stretches(windows):
        left, right = _borders(windows, first)[0], _borders(windows, last)[1]
        labels.axvspan(left, right, color=colors[label], alpha=0.85)
        wide_enough = (right - left) / (end - begin) * WIDTH * 0.84 > 0.085 * len(label)
        labels.text((left + right) / 2, 0.5, label, ha="center", va="center", fontsize=10, color="white", rotation=0 if wide_enough else 90, clip_on=True)
    for number, window in enumerate(windows):
        left, right = _borders(windows, number)
        costs.bar((left + right) / 2, 100 * window.cost, width=right - left, color=colors[window.label], edgecolor="white", linewidth=0.5)
    costs.axhline(100, color=GREY, linewidth=1)
    for axis in (labels, costs):
        axis.set_xlim(begin, end)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
    labels.set_ylim(0, 1)
    labels.set_yticks([])
    labels.set_xticks([])
    costs.set_ylim(0, 105)
    costs.set_yticks([0, 50, 100], ["0", "50", "dense"])
    costs.set_ylabel("GFLOPs, %", color=DARK)
    costs.set_xlabel("seconds", color=DARK)
    return image_of(figure)


def stretches(windows: Sequence[Window]) -> list[tuple[int, int, str]]:
    """Return (first, last, label) of each stretch of windows with one label."""
    found: list[tuple[int, int, str]] = []
    for number, window in enumerate(windows):
        if found and found[-1][2] == window.label:
            found[-1] = (found[-1][0], number, window.label)
        else:
            found.append((number, number, window.label))
    return found


def _borders(windows: Sequence[Window], number: int) -> tuple[float, float]:
    """The part of the time axis that is a window's own: windows may overlap."""
    middle = [(window.start + window.end) / 2 for window in windows]
    left = windows[0].start if number == 0 else (middle[number - 1] + middle[number]) / 2
    right = windows[-1].end if number + 1 == len(windows) else (middle[number] + middle[number + 1]) / 2
    return left, right
