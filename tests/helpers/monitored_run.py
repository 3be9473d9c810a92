"""A small training on videos of three speeds, and the pictures in its event files."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image
from run_tools import run_tool, small_job
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CLASSES = ("fast", "slow", "still")


def job(videos: Path, folder: Path, *more: str) -> None:
    """Train and test a small network on these videos."""
    outcome = run_tool("train", *small_job(videos, folder, "model.sgs.keep_ratio=0.5", "trainer.batch_size=3", "optimizer.lr=0.1", *more))
    assert outcome.code == 0, outcome.err


def events_of(folder: Path) -> EventAccumulator:
    """Load all event files of a folder."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "histograms": 0, "scalars": 0})
    events.Reload()
    return events


def pictures(events: EventAccumulator, tag: str) -> dict[int, Image.Image]:
    """Open the pictures of a tag, by step."""
    found = events.Images(tag)
    assert len({image.step for image in found}) == len(found), "a step is there twice"
    opened = {image.step: Image.open(io.BytesIO(image.encoded_image_string)) for image in found}
    for image in found:
        assert opened[image.step].format == "PNG" and opened[image.step].size == (image.width, image.height)
    return opened
