"""Pictures of which frames of a clip went together, what merging them cost, and what the clip cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from atfr.models.video_net import Sampling
from atfr.viz.colors import COLORS, DARK, GREY

WIDTH, TEXT = 12.0, 2.6  # inches, of the strip of frames and of what stands beside it
MOST_SHOWN = 32  # frames of a strip; of longer clips every second or fourth is shown


@dataclass(frozen=True)
class Merge:
    """What one SGS layer did with one clip of T features.

    Attributes:
        name: of the location.
        assignment: [T] the kept feature that each of the clip's features went into; -1 where into none.
        costs: [T - 1] what merging each feature with the one before it costs: half of the mean squared distance of their
            embeddings; None for a layer that compares nothing or leaves features out.
    """

    name: str
    assignment: np.ndarray
    costs: np.ndarray | None

    @property
    def kept(self) -> int:
        """B'."""
        return int(self.assignment.max()) + 1

    @property
    def runs(self) -> list[tuple[int, int, int]]:
        """(bin, first, end) of each run of neighbouring features that went into one bin, in the order of time."""
        borders = [0, *(np.flatnonzero(np.diff(self.assignment)) + 1), len(self.assignment)]
        return [(int(self.assignment[first]), int(first), int(end)) for first, end in zip(borders, borders[1:]) if self.assignment[first] >= 0]


def merges_of(sampling: Sampling, clip: int) -> list[Merge]:
    """Return what each layer did with one clip of a batch."""
    found = []
    for layer in sampling.layers:
        z, count = layer.proposal.z[clip].detach().float().cpu(), layer.given[clip]
        assignment = layer.assignment[clip, :count].cpu().numpy()
        merges = z.shape[1] > 1 and assignment.min() >= 0  # not one that leaves features out
        costs = (z[1:count] - z[: count - 1]).square().mean(dim=1) / 2
        found.append(Merge(layer.layer, assignment, costs.numpy() if merges else None))
    return found


def as_frames(clip: Tensor) -> np.ndarray:
    """Convert a clip, uint8 [3, T, H, W], to frames [T, H, W, 3]."""
    return clip.permute(1, 2, 3, 0).cpu().numpy()


def merge_picture(frames: np.ndarray, merges: Sequence[Merge], *, gflops: float, dense_gflops: float, title: str = "", width: float = WIDTH) -> Image.Image:
    """Draw a clip's frames, for each layer the bins and kept features below, and the clip's cost beside them.

    Args:
        frames: uint8 [T, H, W, 3].
        merges: one for each layer, in order; none for a dense network.
        gflops, dense_gflops: of the clip, and of the network that keeps all.
        width: inches, of the strip of frames. Letters keep their size.
    """
    shown = _shown(len(frames))
    tall = frames.shape[1] / frames.shape[2] * width / len(shown)  # of a frame, in inches
    rows = [tall + 0.45, *(0.52 + tall + (0.62 if merge.costs is not None else 0) for merge in merges)]
    figure = Figure(figsize=(width + TEXT, max(sum(rows), 1.2) + 0.1), facecolor="white")
    axis = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axis.set_xlim(0, width + TEXT)
    axis.set_ylim(-max(sum(rows), 1.2) - 0.1, 0)
    axis.axis("off")
    axis.text(0, -0.22, title or f"{len(frames)} frames", fontsize=12, fontweight="bold", color=DARK, va="center", parse_math=False)
    _image(axis, _strip(frames[shown]), 0, -0.4 - tall, width, tall)
    top = -rows[0]
    for merge, height in zip(merges, rows[1:]):
        _draw_merge(axis, frames, merge, top, tall, width, several=len(merges) > 1)
        top -= height
    _draw_cost(axis, merges, gflops, dense_gflops, left=width + 0.15, top=-0.4)
    return image_of(figure)


def _draw_merge(axis: Axes, frames: np.ndarray, merge: Merge, top: float, tall: float, width: float, *, several: bool) -> None:
    """Draw one layer: a bar for each run of features in one bin, the kept features below, and the costs of merging."""
    step = width / len(merge.assignment)  # of a feature
    contiguous = len(merge.runs) == merge.kept
    wide = min(tall * frames.shape[2] / frames.shape[1], width / merge.kept - 0.04)
    centres = _centres(merge, width, wide + 0.04, contiguous=contiguous)
    box_top = top - 0.42
    for kept, first, end in merge.runs:
        color = COLORS[kept % len(COLORS)]
        axis.add_artist(Rectangle((first * step + 0.02, top - 0.1), (end - first) * step - 0.04, 0.1, color=color, linewidth=0))
        if contiguous:
            axis.plot([first * step + 0.03, centres[kept], end * step - 0.03], [top - 0.12, box_top + 0.02, top - 0.12], color=color, linewidth=1)
        else:
            axis.plot([(first + end) * step / 2, centres[kept]], [top - 0.12, box_top + 0.02], color=color, linewidth=1)
    for kept, centre in enumerate(centres):
        members = _frames_of(np.flatnonzero(merge.assignment == kept), len(merge.assignment), len(frames))
        color = COLORS[kept % len(COLORS)]
        _image(axis, frames[members].mean(axis=0).astype(np.uint8), centre - wide / 2, box_top - tall, wide, tall, gap=0)
        axis.add_artist(Rectangle((centre - wide / 2, box_top - tall), wide, tall, fill=False, edgecolor=color, linewidth=2))
    kept_text = f"{merge.kept} of {len(merge.assignment)} features kept" + (f" after {merge.name}" if several else "")
    axis.text(width + 0.15, box_top - tall / 2, kept_text.replace(" after", "\nafter"), fontsize=11, color=DARK, va="center")
    if merge.costs is not None:
        _draw_costs(axis, merge, width, box_top - tall - 0.12)


def _draw_costs(axis: Axes, merge: Merge, width: float, top: float) -> None:
    """A bar at each border of two features: what it would cost to merge them. Grey where they were merged."""
    assert merge.costs is not None
    step = width / len(merge.assignment)
    highest = max(float(merge.costs.max()), 1e-12)
    axis.plot([0, width], [top - 0.5, top - 0.5], color=GREY, linewidth=1)
    for at, cost in enumerate(merge.costs, start=1):
        merged = merge.assignment[at] == merge.assignment[at - 1]
        axis.add_artist(Rectangle((at * step - 0.2 * step, top - 0.5), 0.4 * step, 0.5 * cost / highest, color="#a3aab2" if merged else DARK, linewidth=0))
    axis.text(width + 0.15, top - 0.28, "cost of merging neighbours\n(black: kept apart)", fontsize=9, color=DARK, va="center")


def _draw_cost(axis: Axes, merges: Sequence[Merge], gflops: float, dense: float, *, left: float, top: float) -> None:
    """Two bars: the GFLOPs of the dense network and of this clip."""
    bars, full = left + 0.75, 1.1 / max(gflops, dense)
    for number, (label, value, color) in enumerate((("dense", dense, GREY), ("this clip", gflops, COLORS[0]))[: 2 if merges else 1]):
        bottom = top - 0.3 - 0.4 * number
        axis.add_artist(Rectangle((bars, bottom), full * value, 0.24, color=color, linewidth=0))
        axis.text(left, bottom + 0.12, label, fontsize=9, color=DARK, va="center")
        axis.text(bars + full * value + 0.06, bottom + 0.12, f"{value:#.3g}".rstrip("."), fontsize=9, fontweight="bold", color=DARK, va="center")
    axis.text(left, top + 0.16, "GFLOPs", fontsize=9, color=DARK, va="center")


def _centres(merge: Merge, width: float, wide: float, *, contiguous: bool) -> list[float]:
    """Where each kept feature is drawn: below the middle of its bin, but `wide` apart."""
    if not contiguous:
        return [(kept + 0.5) * width / merge.kept for kept in range(merge.kept)]
    centres = [(first + end) / 2 * width / len(merge.assignment) for _, first, end in merge.runs]
    for at in range(len(centres)):
        centres[at] = max(centres[at], centres[at - 1] + wide if at else wide / 2)
    for at in reversed(range(len(centres))):
        centres[at] = min(centres[at], centres[at + 1] - wide if at + 1 < len(centres) else width - wide / 2)
    return centres


def _shown(count: int) -> list[int]:
    every = -(-count // MOST_SHOWN)
    return list(range(0, count, every))


def _frames_of(features: np.ndarray, count: int, frames: int) -> np.ndarray:
    """The frames that these of `count` features are made of."""
    return np.flatnonzero(np.isin(np.arange(frames) * count // frames, features))


def _strip(frames: np.ndarray) -> np.ndarray:
    """Put frames [N, H, W, 3] side by side, with white gaps. One image takes matplotlib a fraction of the time of many."""
    gap = max(frames.shape[2] // 24, 1)
    strip = np.pad(frames, ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=255)  # [N, H, W + gap, 3]
    return np.concatenate(list(strip), axis=1)


def _image(axis: Axes, image: np.ndarray, left: float, bottom: float, width: float, height: float, gap: float = 0.02) -> None:
    axis.imshow(image, extent=(left + gap, left + width - gap, bottom, bottom + height), interpolation="antialiased", aspect="auto", zorder=2)


def image_of(figure: Figure, dpi: int = 110) -> Image.Image:
    """Render a figure."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture as a PNG of few bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(256).save(path, optimize=True)
