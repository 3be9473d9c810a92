"""Testing: every view of every video exactly once, on any number of processes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Iterable

import numpy as np
import torch
from torch import nn

from atfr.data.types import Unreadable
from atfr.engine.distributed import comm
from atfr.engine.distributed.comm import DistInfo
from atfr.engine.distributed.preemption import StopFlag
from atfr.models.video_net import VideoNet
from atfr.utils.progress import watched

LOOK_EVERY = 4  # batches between two looks, of all processes together, at whether to stop


@dataclass(frozen=True)
class View:
    """One clip's outcome: softmax scores [classes] and how many features it kept."""

    video: int  # index into the split
    view: int
    path: str
    label: int
    scores: np.ndarray  # float32; a list of Python floats would take eight times the memory
    bins: tuple[int, ...]  # one number a layer


@dataclass
class Evaluation:
    """All views of a split, sorted by video and view, and the videos that could not be read, sorted by path.

    A video is a row of the list: a file that is listed three times is three videos.
    """

    views: list[View] = field(default_factory=list)
    failed: dict[int, Unreadable] = field(default_factory=dict)  # by video
    decoders: dict[int, str] = field(default_factory=dict)  # by video: what read it
    frames: tuple[int, ...] = ()  # T at each layer
    batches: list[list[tuple[int, ...]]] = field(default_factory=list)  # B' of each clip of each executed batch
    network_seconds: float = 0.0  # spent in the network alone, summed over processes

    @property
    def clips_per_second(self) -> float:
        """Clips a second of network time and process: decoding is not in it."""
        return len(self.views) / self.network_seconds if self.network_seconds else 0.0


@torch.inference_mode()
def evaluate(
    model: VideoNet,
    loader: Iterable[Any],
    *,
    normalise: nn.Module,
    dist_info: DistInfo,
    precision: torch.dtype = torch.float32,
    title: str = "test",
    stop: StopFlag | None = None,
) -> Evaluation:
    """Run `model` over this process's share of a split and gather the views of all processes.

    A video that cannot be read is never replaced: it is listed under `failed` with its reason.

    Raises:
        FloatingPointError: the scores of a clip are NaN or infinite; names its file.
        Interrupted: on every process, if `stop` says so on one.
    """
    model.eval()
    own = Evaluation()
    in_all = -comm.largest(-len(loader)) if stop else 0  # one process may have a batch more than another
    for number, batch in enumerate(watched(loader, title, unit="batch", shown=dist_info.is_main)):
        if number < in_all and number % LOOK_EVERY == 0:
            comm.stop_together(stop, f"during the {title}")
        own.failed.update((failed.video, failed) for failed in batch.failed)
        if batch.clips is None:
            continue
        clips = normalise(batch.clips.to(dist_info.device, non_blocking=True))
        _wait(dist_info.device)
        began = time.perf_counter()
        with torch.autocast(dist_info.device.type, dtype=precision, enabled=precision != torch.float32):
            prediction = model(clips)
        scores = prediction.logits.float().softmax(dim=1).cpu().numpy()
        _wait(dist_info.device)
        own.network_seconds += time.perf_counter() - began
        for path, row in zip(batch.paths, scores):
            if not np.isfinite(row).all():
                raise FloatingPointError(f"the network's scores for {path} are NaN or infinite: its weights are spoilt")
        own.decoders.update(zip(map(int, batch.videos), batch.decoders))
        own.frames = prediction.frames
        own.batches.append(prediction.bins)
        rows = zip(batch.videos, batch.views, batch.paths, batch.labels, scores, prediction.bins)
        own.views += [View(int(video), int(view), path, int(label), s, b) for video, view, path, label, s, b in rows]
    return _merged(comm.gathered([own]))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _merged(parts: list[Evaluation]) -> Evaluation:
    whole = Evaluation(frames=max(part.frames for part in parts))
    for part in parts:
        whole.views += part.views
        whole.failed.update(part.failed)
        whole.decoders.update(part.decoders)
        whole.batches += part.batches
        whole.network_seconds += part.network_seconds
    whole.views.sort(key=lambda view: (view.video, view.view))
    # A video of which one view failed is not half-counted: it failed.
    whole.views = [view for view in whole.views if view.video not in whole.failed]
    whole.failed = dict(sorted(whole.failed.items(), key=lambda item: (item[1].path, item[0])))
    return whole
