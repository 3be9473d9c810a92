"""Draw docs/figure.png: two clips, the bins that the `atfr` preset cuts them into, and what each clip costs X3D-S.

    python scripts/readme_figure.py        # a minute on two CPU cores

The clips are built-in videos. Bins and GFLOPs are those of X3D-S with SGS after its stem, calibrated to a mean of half
of the dense GFLOPs on other built-in videos. No weights are needed: the preset cuts a clip by its frames alone.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import atfr
from atfr.data.datasets.synthetic_scene import render
from atfr.viz.merges import merge_picture, merges_of, save

FRAMES, SIDE = 13, 160  # the clip that X3D-S was published with
WIDTH = 7.5  # inches, of the frames of a clip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/figure.png"), metavar="FILE")
    parser.add_argument("--clips", type=int, default=32, help="clips to calibrate on (default: %(default)s)")
    arguments = parser.parse_args()
    shown = shown_clips()
    model = atfr.create_model("x3d_s", num_classes=400, sgs="atfr").eval()
    atfr.calibrate(model, as_input([whole(video(index)) for index in range(arguments.clips)]), gflops=0.5)
    with torch.inference_mode():
        _, sampling = model(as_input(list(shown.values())), return_sampling=True)
    dense = model.gflops_table(sampling.clip_shape).dense
    pictures = []
    for number, (title, frames) in enumerate(shown.items()):
        merges = [replace(merge, costs=None) for merge in merges_of(sampling, number)]
        pictures.append(np.asarray(merge_picture(frames, merges, gflops=sampling.gflops[number].item(), dense_gflops=dense, title=title, width=WIDTH)))
    save(Image.fromarray(np.concatenate(pictures)), arguments.output)


def shown_clips() -> dict[str, np.ndarray]:
    """Two clips [T, H, W, 3], by what they show: the start of a video, and a whole one."""
    return {"little change": video(38, split="test")[:FRAMES], "four events": whole(video(61, split="test"))}


def video(index: int, split: str = "train") -> np.ndarray:
    """A built-in video: uint8 [36, H, W, 3]."""
    return render(index, split=split, size=SIDE)[0]


def whole(frames: np.ndarray) -> np.ndarray:
    """FRAMES frames at equal distances over the whole video."""
    return frames[np.linspace(0, len(frames) - 1, FRAMES).round().astype(int)]


def as_input(clips: list[np.ndarray]) -> Tensor:
    """N of uint8 [T, H, W, 3] -> normalised [N, 3, T, H, W]."""
    return (torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float() / 255 - 0.45) / 0.225


if __name__ == "__main__":
    main()
