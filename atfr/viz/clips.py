"""Pictures of what a network merges in given clips, titled with the class that it finds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL.Image import Image
from torch import Tensor, nn

from atfr.models.graph.probing import evaluating
from atfr.models.video_net import VideoNet
from atfr.utils.printable import shortened
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
        clips: uint8 [3, T, H, W], which run one after another: in memory for a batch of one.
        normalise: converts clips from uint8 to the network's input.
        labels: the class of each clip; None: it is not known.
        precision: of autocast; float32 means none.
    """
    device, pictures = next(model.parameters()).device, []
    for clip, label in zip(clips, [None] * len(clips) if labels is None else labels):
        with evaluating(model), torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
            logits, sampling = model(normalise(clip[None].to(device)), return_sampling=True)
        score, prediction = logits[0].float().softmax(dim=0).max(dim=0)
        table = model.gflops_table(tuple(clip.shape))
        cost = float(table.estimate(sampling.bins)[0]) if table.frames else table.dense
        title = _title(class_names, label, int(prediction), score.item())
        pictures.append(merge_picture(as_frames(clip), merges_of(sampling, 0), gflops=cost, dense_gflops=table.dense, title=title))
    return pictures


def _title(class_names: Sequence[str], label: int | None, prediction: int, score: float) -> str:
    found = f"{shortened(class_names[prediction], LONGEST_NAME)}, {100 * score:.0f} %"
    if label is None:
        return found
    return f"class: {shortened(class_names[label], LONGEST_NAME)}     prediction: {found} ({'correct' if label == prediction else 'wrong'})"
