"""What TensorBoard shows of a validation besides its metrics: histograms and pictures."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from atfr.engine.validation import ClipResults, Validation

if TYPE_CHECKING:
    from PIL.Image import Image

GFLOPS_BUCKETS = 40  # of the histogram, from 0 to the dense GFLOPs


def add_validation(writer: SummaryWriter, validation: Validation, step: int) -> None:
    """Write the histograms and pictures of a validation after `step` steps. The tags are the same each time."""
    if validation.clips is not None:
        _add_histograms(writer, validation.clips, step)
        _add_charts(writer, validation.clips, step)
    for number, picture in enumerate(validation.merges, start=1):
        add_picture(writer, f"val_merges/clip_{number}", picture, step)


def _add_histograms(writer: SummaryWriter, clips: ClipResults, step: int) -> None:
    for number, (layer, frames) in enumerate(zip(clips.bins, clips.frames)):
        name = f"bins_{layer}" if number else "bins"  # as the metrics are called
        writer.add_histogram(f"val_clips/{name}", clips.bins[layer], step, bins=np.arange(frames + 2) - 0.5)  # type: ignore[arg-type]
    if clips.dense_gflops is not None:
        edges = np.linspace(0, max(clips.dense_gflops, clips.gflops.max()), GFLOPS_BUCKETS + 1)
        writer.add_histogram("val_clips/gflops", clips.gflops, step, bins=edges)  # type: ignore[arg-type]


def _add_charts(writer: SummaryWriter, clips: ClipResults, step: int) -> None:
    from atfr.viz.validation import accuracy_by_bins_picture, class_accuracy_picture, confusion_picture  # matplotlib takes a second to import

    confusion = clips.confusion()
    add_picture(writer, "val_classes/confusion", confusion_picture(confusion, clips.class_names), step)
    add_picture(writer, "val_classes/accuracy", class_accuracy_picture(confusion, clips.class_names), step)
    if clips.bins:
        right, total = zip(*map(clips.by_bins, clips.bins))
        add_picture(writer, "val_clips/accuracy_by_bins", accuracy_by_bins_picture(right, total, list(clips.bins)), step)


def add_picture(writer: SummaryWriter, tag: str, picture: Image, step: int) -> None:
    """Write a picture as a PNG with a palette, which has a third of the bytes that `add_image` writes."""
    png = io.BytesIO()
    picture.quantize(256, method=2).save(png, "png")  # FASTOCTREE: the default method takes longer than the drawing
    image = Summary.Image(height=picture.height, width=picture.width, colorspace=3, encoded_image_string=png.getvalue())
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
