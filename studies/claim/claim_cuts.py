"""How many phases of the built-in clips a layer leaves a feature of their own, with no network at all: what any z could gain.

    python studies/claim/claim_cuts.py         # a minute; writes its table into studies/claim/README.md, between its marks

The class of a built-in video is the order of its four phases. A phase has a feature of its own where a bin holds frames
of that phase alone. Our layers' bins are cut by the pixels that networks see, at a width calibrated on training videos.
"""

from __future__ import annotations

import argparse
import os
from typing import NamedTuple

import numpy as np
import torch
from claim import ROOT, config_of
from claim_report import DETAILS, fill
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from atfr.cli.config import build, with_resolved_sgs
from atfr.data.datasets.synthetic_scene import PHASES, render
from atfr.data.temporal_sampling import uniform_views
from atfr.data.transforms import Normalizer, test_crops
from atfr.models.sgs.layer import SGS
from atfr.models.sgs.sampling import sample

VIDEOS = 400  # of each split
DATA = ("uneven", "even", "distractors")  # files of configs/experiment/claim
LAYERS = {  # what the table calls them, and their options
    **{f"atfr-{share}": ("atfr", f"model.sgs.keep_ratio={share}") for share in (0.3, 0.34, 0.36, 0.4, 0.44, 0.5)},
    **{f"{name}-0.4": ("atfr", f"model.sgs.similarity={name}", "model.sgs.keep_ratio=0.4") for name in ("anchor", "path")},
    **{f"{name}-{k}": (name, f"model.sgs.num_bins={k}") for name in ("uniform", "stride") for k in (6, 7, 8)},
}


class Clips(NamedTuple):
    shown: Tensor  # [N, 3, T, H, W] as a network is given them
    parts: Tensor  # [N, T] of which part of its video a frame is: 0 before the phases, 1 to 4, 5 after them


class Found(NamedTuple):
    kept: float  # mean B'
    phases: float  # share of the phases that have a feature of their own
    clips: float  # share of the clips of which all four have


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    os.chdir(ROOT)
    layers = {name: layer(preset, *overrides) for name, (preset, *overrides) in LAYERS.items()}
    found = {}
    for data in DATA:
        dataset = config_of(data).dataset
        seen, asked = (clips_of(dataset, split, VIDEOS) for split in ("train", "test"))
        for name in layers:
            found[name, data] = found_by(layers[name], seen, asked)
    lines = ["| layer |" + "".join(f" {data}: B' | phases, % | clips with all, % |" for data in DATA), "|---|" + "---|---|---|" * len(DATA)]
    for name in layers:
        cells = (f" {kept:.1f} | {100 * phases:.1f} | {100 * clips:.1f} |" for kept, phases, clips in (found[name, data] for data in DATA))
        lines.append(f"| {name} |{''.join(cells)}")
    fill(DETAILS, "cuts", "\n".join(lines), script="claim_cuts.py")
    print("\n".join(lines))


def clips_of(dataset: DictConfig, split: str, count: int) -> Clips:
    """The middle view of the first videos of a split."""
    frames, side, normalise = dataset.clip.frames, dataset.clip.crop_size, Normalizer(dataset.clip.mean, dataset.clip.std)
    shown, parts = [], []
    for index in tqdm(range(count), unit="video", desc=f"{dataset.dwell} {split}"):
        video, _, truth = render(index, seed=dataset.seed, split=split, dwell=dataset.dwell, distractors=dataset.get("distractors", False))
        times = uniform_views(len(video), frames=frames, stride=dataset.clip.stride, views=1)[0]
        shown.append(test_crops(torch.from_numpy(video[times]).permute(0, 3, 1, 2), short_side=side, crop_size=side, crops=1)[0])
        parts.append(np.searchsorted([*truth.timeline.starts, truth.timeline.end], times, side="right"))
    return Clips(normalise(torch.stack(shown)), torch.from_numpy(np.stack(parts)))


def layer(preset: str, *overrides: str) -> SGS:
    """The layer of that preset, for clips themselves."""
    config = config_of(DATA[0], f"model/sgs={preset}", *overrides, "model.sgs.after=input")  # all data have the same layers
    return SGS(3, build(with_resolved_sgs(config.model).sgs, "model.sgs"), name="input").eval()


def found_by(layer: SGS, seen: Clips, asked: Clips) -> Found:
    """What the bins find in the clips `asked`, at a width that suits the clips `seen`."""
    with torch.inference_mode():
        if layer.tracks_width:
            proposal = layer(seen.shown)
            layer.calibrate(proposal.z, proposal.valid)
        done = sample([layer], [asked.shown], [None])[1][0]
    return Found(float(np.mean(done.segments.lengths)), *own_features(done.weights, asked.parts))


def own_features(weights: Tensor, parts: Tensor) -> tuple[float, float]:
    """Weights [N, B, T] of frames in bins, and the part that each frame [N, T] is of: shares of phases and of clips."""
    held = weights > 0  # [N, B, T]
    phases = torch.arange(1, len(PHASES) + 1)
    foreign = (held[:, :, None] & (parts[:, None, None] != phases[:, None])).any(dim=3)  # [N, B, 4]: whether it holds another part's frames
    own = (held.any(dim=2)[:, :, None] & ~foreign).any(dim=1)  # [N, 4]
    return own.double().mean().item(), own.all(dim=1).double().mean().item()


if __name__ == "__main__":
    main()
