"""Pictures of what a network merges in given clips, titled with the class that it finds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL.Image import Image
from torch import Tensor, nn

from atfr.models.graph.probing import evaluating
from atfr.models.video_net import VideoNet
from atfr.utils.printable import printable
from atfr.viz.merges import as_frames, merge_picture, merges_of

LONGEST_NAME = 40  # letters of a class in a title


def merge_pictures(
    model: VideoNet,
    clips: Sequence[Tensor],
    *,
    normalise: nn.Module,
    class_names: Sequence[str],
    labels: Sequence[int] | None = None,
    precision: torch.dtype = torch.float32,
) -> list[Image]:
    """Draw which frames of each clip the SGS layers put together. The network is left in the mode that it is in.

    Args:
        clips: uint8 [3, T, H, W] of one shape, which run as one batch.
        normalise: converts clips from uint8 to the network's input.
        labels: the class of each clip; None: it is not known.
        precision: of autocast; float32 means none.
    """
    if not clips:
        return []
    device = next(model.parameters()).device
    inputs = normalise(torch.stack(list(clips)).to(device))  # [N, 3, T, H, W]
    with evaluating(model), torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
        logits, sampling = model(inputs, return_sampling=True)
    scores, predictions = (values.tolist() for values in logits.float().softmax(dim=1).max(dim=1))
    table = model.gflops_table(tuple(clips[0].shape))
    costs = table.estimate(sampling.bins).tolist() if table.frames else [table.dense] * len(clips)
    known = [None] * len(clips) if labels is None else labels
    titles = [_title(class_names, *found) for found in zip(known, predictions, scores)]
    return [
        merge_picture(as_frames(clip), merges_of(sampling, number), gflops=cost, dense_gflops=table.dense, title=title)
        for number, (clip, cost, title) in enumerate(zip(clips, costs, titles))
    ]


def _title(class_names: Sequence[str], label: int | None, prediction: int, score: float) -> str:
    found = f"{shortened(class_names[prediction], LONGEST_NAME)}, {100 * score:.0f} %"
    if label is None:
        return found
    return f"class: {shortened(class_names[label], LONGEST_NAME)}     prediction: {found} ({'correct' if label == prediction else 'wrong'})"


def shortened(name: str, longest: int) -> str:
    """Return a name as one line that can be drawn, cut after `longest` letters."""
    name = " ".join(printable(name).split())
    return name if len(name) <= longest else name[: longest - 1].rstrip() + "…"
