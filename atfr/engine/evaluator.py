"""Evaluation: every view of every video exactly once, on any number of ranks."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Iterable

import numpy as np
import torch
from torch import nn

from atfr.data.types import EvalBatch, Unreadable
from atfr.engine.distributed import comm
from atfr.engine.distributed.comm import DistInfo
from atfr.engine.distributed.preemption import StopFlag
from atfr.models.video_net import VideoNet
from atfr.utils.progress import watched

STOP_EVERY = 4  # batches between two checks for a stop signal, which all ranks do together


@dataclass(frozen=True)
class View:
    """The result of one clip: softmax scores [classes] and B'."""

    video: int  # index into the split
    view: int
    path: str
    label: int
    scores: np.ndarray  # float32; a list of Python floats would take eight times the memory
    bins: tuple[int, ...]  # B' at each SGS layer


@dataclass
class Evaluation:
    """The results of a split: views sorted by video and view, and unreadable videos sorted by path.

    Each row of the list is a video. A file that is listed three times is three videos.
    """

    views: list[View] = field(default_factory=list)
    failed: dict[int, Unreadable] = field(default_factory=dict)  # by video
    decoders: dict[int, str] = field(default_factory=dict)  # by video: which decoder read it
    frames: tuple[int, ...] = ()  # T at each SGS layer
    network_seconds: float = 0.0  # time in the network only, summed over ranks

    @property
    def clips_per_second(self) -> float:
        """Clips per second and rank, counting only the time in the network."""
        return len(self.views) / self.network_seconds if self.network_seconds else 0.0


@torch.inference_mode()
def evaluate(
    model: VideoNet,
    loader: Iterable[EvalBatch],
    *,
    normalise: nn.Module,
    dist_info: DistInfo,
    precision: torch.dtype = torch.float32,
    title: str = "test",
    stop: StopFlag | None = None,
) -> Evaluation:
    """Run `model` on this rank's part of a split, and gather the results of all ranks on each of them.

    A video that cannot be read is listed in `failed` with the reason. It is never replaced.

    Args:
        loader: this rank's batches. With `stop` it needs a length.
        normalise: converts clips from uint8 to the network's input.

    Raises:
        FloatingPointError: the scores of a clip are NaN or infinite; names its file.
        Interrupted: on all ranks, after a signal on one of them.
    """
    model.eval()
    own = Evaluation()
    # Batches that all ranks have; some may have one more. With `stop`, the loader has a length.
    common = -comm.largest(-len(loader)) if stop else 0  # type: ignore[arg-type]
    for number, batch in enumerate(watched(loader, title, unit="batch", shown=dist_info.is_main)):
        if number < common and number % STOP_EVERY == 0:
            comm.stop_together(stop, f"during the {title}")
        own.failed.update((failed.video, failed) for failed in batch.failed)
        if batch.clips is None:
            continue
        clips = normalise(batch.clips.to(dist_info.device, non_blocking=True))
        _wait(dist_info.device)
        began = time.perf_counter()
        with torch.autocast(dist_info.device.type, dtype=precision, enabled=precision != torch.float32):
            logits, sampling = model(clips, return_sampling=True)
        scores = logits.float().softmax(dim=1).cpu().numpy()
        _wait(dist_info.device)
        own.network_seconds += time.perf_counter() - began
        for path, row in zip(batch.paths, scores):
            if not np.isfinite(row).all():
                raise FloatingPointError(f"the network's scores for {path} are NaN or infinite, so its weights are damaged; use an earlier checkpoint")
        own.decoders.update(zip(map(int, batch.videos), batch.decoders))
        own.frames = sampling.frames
        rows = zip(batch.videos, batch.views, batch.paths, batch.labels, scores, sampling.bins)
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
        whole.network_seconds += part.network_seconds
    whole.views.sort(key=lambda view: (view.video, view.view))
    # A video fails if one of its views fails.
    whole.views = [view for view in whole.views if view.video not in whole.failed]
    whole.failed = dict(sorted(whole.failed.items(), key=lambda item: (item[1].path, item[0])))
    return whole
