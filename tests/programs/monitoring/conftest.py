"""A small training with all its monitoring, and what a plain loop predicts for its validation clips."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from monitored_run import CLASSES, job
from video_files import write_video

import atfr
from atfr.cli.classifier import Classifier
from atfr.data.clips import TestClips
from atfr.data.transforms import Normalizer
from atfr.data.types import Video

SPEED = {"fast": 4, "slow": 1, "still": 0}


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> Path:
    """Tiny videos of a square that moves at one of three speeds: 6 for training and 9 for validation."""
    root, rng = tmp_path_factory.mktemp("speeds"), np.random.default_rng(0)
    lists: dict[str, list[str]] = {"train": [], "test": []}
    for number in range(15):
        label = CLASSES[number % 3]
        frames = np.repeat(rng.integers(0, 60, (1, 32, 40, 3), dtype=np.uint8), 16, axis=0)
        for t, frame in enumerate(frames):
            left = SPEED[label] * t % 30
            frame[10:20, left : left + 10] = 230
        write_video(root / f"{number}.mp4", frames, codec="libx264")
        lists["train" if number < 6 else "test"].append(f"{number}.mp4,{label}")
    for split, lines in lists.items():
        (root / f"{split}.csv").write_text("path,label\n" + "\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="session")
def run(videos, tmp_path_factory) -> Path:
    """A run of two epochs of two steps."""
    folder = tmp_path_factory.mktemp("run")
    job(videos, folder, "trainer.tensorboard_pictures=3", "trainer.examples=2")
    return folder


@dataclass
class Plain:
    """What the network of the last checkpoint says of each validation clip, one by one."""

    classifier: Classifier
    clips: list[torch.Tensor]
    labels: list[int]
    predictions: list[int]
    bins: list[int]
    gflops: list[float]

    def counts(self) -> np.ndarray:
        counts = np.zeros((3, 3), int)
        for label, prediction in zip(self.labels, self.predictions):
            counts[label, prediction] += 1
        return counts


@pytest.fixture(scope="session")
def plain(run, videos) -> Plain:
    classifier = atfr.load(run / "checkpoints/last.pt", device="cpu")
    assert classifier.class_names == CLASSES
    found = Plain(classifier, [], [], [], [], [])
    normalise = Normalizer(classifier.clip.mean, classifier.clip.std)
    for number in range(6, 15):
        clip = TestClips([Video(str(videos / f"{number}.mp4"), 0)], classifier.clip, views=1, crops=1)[0].clip
        with torch.inference_mode():
            logits, sampling = classifier.model(normalise(clip[None]), return_sampling=True)
        found.clips.append(clip)
        found.labels.append(number % 3)
        found.predictions.append(int(logits.argmax()))
        found.bins.append(sampling.bins[0][0])
        found.gflops.append(sampling.gflops.item())
    assert len(set(found.bins)) > 1 and len(set(found.predictions)) > 1, "the clips of this test are all alike"
    return found
