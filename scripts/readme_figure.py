"""Draw docs/figure.png: three clips, the bins that the `atfr` preset cuts them into, and what each clip costs X3D-S.

    python scripts/readme_figure.py        # a minute on two CPU cores

The clips are built-in videos. Bins and GFLOPs are those of X3D-S with SGS after its stem, calibrated to a mean of half
of the dense GFLOPs on other built-in videos. No weights are needed: the preset cuts a clip by its frames alone.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

import atfr
from atfr.data.datasets.synthetic_scene import render

FRAMES, SIDE = 13, 160  # the clip that X3D-S was published with
COLORS = plt.get_cmap("tab10").colors
GREY, BLUE, DARK = "#d0d4d9", "#4c8fd6", "#24292f"
ROW = 3.45  # from one clip to the next, in frame widths
MONTAGE = {4: 1, 12: 2, 20: 1, 25: 1, 31: 2, 33: 1, 45: 1, 48: 2, 53: 1, 54: 1}  # {video: frames}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/figure.png"), metavar="FILE")
    parser.add_argument("--clips", type=int, default=32, help="clips to calibrate on (default: %(default)s)")
    arguments = parser.parse_args()
    shown = shown_clips()
    model = atfr.create_model("x3d_s", num_classes=400, sgs="atfr").eval()
    atfr.calibrate(model, as_input(np.stack([whole(video(index)) for index in range(arguments.clips)])), gflops=0.5)
    with torch.inference_mode():
        clips = as_input(np.stack(list(shown.values())))
        _, sampling = model(clips, return_sampling=True)
        _, dense = atfr.create_model("x3d_s", num_classes=400).eval()(clips[:1], return_sampling=True)
    draw(shown, sampling.layers[0].assignment.numpy(), sampling.gflops.tolist(), dense.gflops.item(), arguments.output)


def shown_clips() -> dict[str, np.ndarray]:
    """Three clips [T, H, W, 3], by what they show: little change, a whole video, and a montage of several videos."""
    cuts = [video(index, split="test")[8 : 8 + length] for index, length in MONTAGE.items()]
    return {
        "little change": video(38, split="test")[:FRAMES],
        "four events": whole(video(61, split="test")),
        "fast cuts": np.concatenate(cuts),
    }


def video(index: int, split: str = "train") -> np.ndarray:
    """A built-in video: uint8 [36, H, W, 3]."""
    return render(index, split=split, size=SIDE)[0]


def whole(frames: np.ndarray) -> np.ndarray:
    """FRAMES frames at equal distances over the whole video."""
    return frames[np.linspace(0, len(frames) - 1, FRAMES).round().astype(int)]


def as_input(clips: np.ndarray) -> Tensor:
    """uint8 [N, T, H, W, 3] -> normalised [N, 3, T, H, W]."""
    return (torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 255 - 0.45) / 0.225


def draw(clips: dict[str, np.ndarray], bins: np.ndarray, gflops: list[float], dense: float, output: Path) -> None:
    """Each clip's frames above its kept features, coloured by bin, and bars of GFLOPs beside them."""
    figure, axis = plt.subplots(figsize=(9, 4.6))
    axis.set_aspect("equal")
    axis.axis("off")
    left, full = FRAMES + 0.8, 4.4  # of the bars, in frame widths
    axis.text(left, 0.12, "GFLOPs of the clip", fontsize=9.5, color=DARK, va="bottom")
    for number, ((name, frames), assignment, cost) in enumerate(zip(clips.items(), bins, gflops)):
        top = -number * ROW
        axis.text(0, top + 0.12, name, fontsize=10.5, fontweight="bold", color=DARK, va="bottom")
        axis.text(FRAMES, top + 0.12, f"{FRAMES} frames, {assignment.max() + 1} kept", fontsize=9.5, color=DARK, va="bottom", ha="right")
        draw_clip(axis, frames, assignment, top)
        for label, value, color, bottom in (("dense", dense, GREY, top - 0.97), ("SGS", cost, BLUE, top - 2.5)):
            axis.add_patch(Rectangle((left, bottom), full * value / dense, 0.94, color=color, linewidth=0))
            axis.text(left + 0.15, bottom + 0.47, label, fontsize=9.5, color=DARK, va="center")
            axis.text(left + max(full * value / dense, 1) + 0.15, bottom + 0.47, f"{value:.2f}", fontsize=9.5, fontweight="bold", color=DARK, va="center")
    axis.set_xlim(-0.1, left + full + 1.1)
    axis.set_ylim(-2 * ROW - 2.6, 0.9)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=140, bbox_inches="tight", pad_inches=0.05)
    Image.open(picture).convert("RGB").quantize(256).save(output, optimize=True)  # half of the bytes
    plt.close(figure)


def draw_clip(axis: Axes, frames: np.ndarray, assignment: np.ndarray, top: float) -> None:
    """The frames of one clip in a row, and below them each bin's mean frame, in the middle of its bin."""
    for kept in range(assignment.max() + 1):
        members = np.flatnonzero(assignment == kept)
        left, right, color = members[0], members[-1] + 1, COLORS[kept % len(COLORS)]
        for at in members:
            axis.imshow(frames[at], extent=(at + 0.03, at + 0.97, top - 0.97, top - 0.03), interpolation="antialiased")
        axis.add_patch(Rectangle((left + 0.04, top - 1.12), right - left - 0.08, 0.09, color=color))
        middle = (left + right) / 2
        axis.plot([left + 0.5, middle, right - 0.5], [top - 1.14, top - 1.5, top - 1.14], color=color, linewidth=1.5, zorder=0)
        box = (middle - 0.47, middle + 0.47, top - 2.5, top - 1.56)
        axis.imshow(frames[members].mean(axis=0).astype(np.uint8), extent=box, interpolation="antialiased")
        axis.add_patch(Rectangle((box[0], box[2]), 0.94, 0.94, fill=False, edgecolor=color, linewidth=2.5))


if __name__ == "__main__":
    main()
