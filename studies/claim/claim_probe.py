"""What the study (studies/claim/claim.py) asks of a trained network that samples: the time it saves, and what B' follows.

    python studies/claim/claim_probe.py RUN_FOLDER         # writes probe.json

*Time*: the test clips go through the network and, batch for batch, through the same network without the layer. Taken in turns, both
have the same share of a machine on which other runs go on, so that their ratio is one of the study's figures; clips a second
are not, and are here for orientation.

*Change* (generated videos and adaptive layers only): all test videos have equally many events, so
this plays clips of which the amount of change is known: a random share of a test video stretched over a whole clip (none of it, in every fifth clip: one frame held),
with sensor noise anew for each frame, as a camera that films something still would give. And the busiest clips that there can be: every
frame of another video. Where the videos have distractors, it also says how B' follows the number of events in a clip, and how the
amount of change that means nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Iterator

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from atfr.cli import builders
from atfr.cli.from_checkpoint import trained_model
from atfr.data.clips import TestClips
from atfr.data.datasets.synthetic_scene import NOISE, WINDOW, render, step_changes
from atfr.data.loader import test_loader
from atfr.data.transforms import Normalizer, test_crops
from atfr.engine.distributed.comm import DistInfo
from atfr.engine.run import checkpoint
from atfr.models.graph.tracing import DenseNetwork
from atfr.models.video_net import VideoNet
from atfr.utils.atomic_io import write_text
from atfr.utils.malloc import keep_freed_memory

RESULT = "probe.json"
CPU = DistInfo(0, 1, torch.device("cpu"))
LEAST = 40  # batches that are timed; a short list of test clips is gone through again
CLIPS, STATIC_EVERY, BATCH = 300, 5, 50  # that are played


@dataclass(frozen=True)
class Play:
    """A clip that shows a part of a test video."""

    clip: Tensor  # uint8 [3, T, H, W]
    change: float  # mean a step, in grey levels, without the sensor noise
    events: int  # beginnings and ends of phases in it
    distractors: float  # amount of change that means nothing in its video, 0 to 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    keep_freed_memory()  # as training and testing do
    path = folder / "checkpoints" / "last.pt"
    state = checkpoint.load(path)
    config = OmegaConf.create(state["config"])
    model = trained_model(config, state, path, CPU).eval()
    result = time_saved(model, config)
    if "dwell" in config.dataset and not all(layer.is_baseline for layer in model.sgs.values()):
        result |= what_bins_follow(model, config)
    write_text(folder / RESULT, json.dumps(result) + "\n")
    print({key: value for key, value in result.items() if isinstance(value, float)})


def time_saved(model: VideoNet, config: DictConfig) -> dict[str, float]:
    """Time the network with its layer and without, on the test clips."""
    clip = builders.clip_settings(config)
    views = TestClips(builders.load_source(config, CPU).test, clip, views=clip.views, crops=clip.crops)
    loader = test_loader(views, batch_size=config.trainer.batch_size)
    normalise = Normalizer(clip.mean, clip.std)
    batches = [normalise(batch.clips).contiguous(memory_format=torch.channels_last_3d) for batch in loader if batch.clips is not None]
    repeats = -(-LEAST // len(batches))
    sampled, dense = in_turns((model, DenseNetwork(model.dense_network)), batches * repeats)
    clips = repeats * sum(len(batch) for batch in batches) - len(batches[0])  # the first batch does not count
    speeds = {"clips_per_second": clips / sampled, "dense_clips_per_second": clips / dense}
    return {"time_of_dense": sampled / dense, **speeds, "batch_size": config.trainer.batch_size}


def in_turns(ways: tuple[Callable[[Tensor], object], ...], batches: Iterable[Tensor]) -> list[float]:
    """Seconds that each way takes for all batches, after one that does not count."""
    spent = [0.0] * len(ways)
    with torch.inference_mode():
        for number, batch in enumerate(batches):
            for way, run in enumerate(ways):
                began = time.perf_counter()
                run(batch)
                spent[way] += (time.perf_counter() - began) * (number > 0)
    return spent


def what_bins_follow(model: VideoNet, config: DictConfig) -> dict[str, object]:
    """Correlate B' with what is known of the clips that are played."""
    clip = builders.clip_settings(config)
    normalise = Normalizer(clip.mean, clip.std)

    def bins(clips: list[Tensor]) -> list[int]:
        """B' of clips [3, T, H, W]; of several layers the last one's."""
        found = []
        for begin in range(0, len(clips), BATCH):
            with torch.inference_mode():
                _, sampling = model(normalise(torch.stack(clips[begin : begin + BATCH])), return_sampling=True)
                found += sampling.layers[-1].segments.lengths
        return found

    played = list(plays(config.dataset, frames=clip.frames, side=clip.crop_size))
    kept = bins([play.clip for play in played])
    busy = bins(shuffled([play.clip for play in played]))
    change = [play.change for play in played]
    result = {
        "spearman": spearman(np.array(kept), np.array(change)),
        "static": float(np.mean(kept[::STATIC_EVERY])),
        "busy": float(np.mean(busy)),
        "bins": kept,
        "change": change,
    }
    if config.dataset.get("distractors"):
        moving = np.arange(len(played)) % STATIC_EVERY > 0
        for name in ("events", "distractors"):
            values = np.array([getattr(play, name) for play in played])
            result |= {name: values.tolist(), f"{name}_spearman": spearman(np.array(kept)[moving], values[moving])}
    return result


def plays(dataset: DictConfig, *, frames: int, side: int) -> Iterator[Play]:
    """Play the test videos."""
    for index in range(CLIPS):
        video, _, truth = render(index, seed=dataset.seed, split="test", dwell=dataset.dwell, distractors=dataset.get("distractors", False))
        random = np.random.default_rng([index, CLIPS])
        span = 0.0 if index % STATIC_EVERY == 0 else random.uniform() * (WINDOW - 1)
        start = random.uniform(0, len(video) - 1 - span)
        shown = video[np.rint(np.linspace(start, start + span, frames)).astype(int)]  # [T, H, W, 3]
        noisy = np.rint((shown + random.normal(0, 255 * NOISE, shown.shape)).clip(0, 255)).astype(np.uint8)
        clip = test_crops(torch.from_numpy(noisy).permute(0, 3, 1, 2), short_side=side, crop_size=side, crops=1)[0]
        events = sum(round(start) < event <= round(start + span) for event in (*truth.timeline.starts, truth.timeline.end))
        yield Play(clip, float(step_changes(shown).mean()), events, truth.distractors)


def shuffled(clips: list[Tensor]) -> list[Tensor]:
    """As many clips, every frame of another one of them."""
    stacked, time = torch.stack(clips), torch.arange(clips[0].shape[1])
    return [stacked[(begin + 7 * time) % len(clips), :, time].transpose(0, 1) for begin in range(len(clips))]


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation of the ranks, equal values sharing their mean rank; nan if one of both never changes."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


if __name__ == "__main__":
    main()
