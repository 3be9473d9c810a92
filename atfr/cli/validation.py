"""Validation during training: accuracy on all ranks, and on rank 0 what TensorBoard shows of the clips."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from atfr.cli import builders
from atfr.data.clips import ClipSettings, TestClips
from atfr.data.loader import with_time_limit
from atfr.data.transforms import Normalizer
from atfr.data.types import Video, VideoSource
from atfr.engine.distributed.comm import DistInfo
from atfr.engine.distributed.preemption import StopFlag
from atfr.engine.metrics import accuracy
from atfr.engine.settings import TrainerSettings, precision_dtype
from atfr.engine.validation import ClipResults, Validation, clip_results
from atfr.models.video_net import VideoNet
from atfr.utils.optional import or_warn

if TYPE_CHECKING:
    from PIL.Image import Image


class Validator:
    """Runs a network on one view of each validation video. Call it on all ranks."""

    def __init__(self, model: VideoNet, source: VideoSource, clip: ClipSettings, *, settings: TrainerSettings, dist_info: DistInfo, stop: StopFlag) -> None:
        self.model, self.source, self.clip, self.settings, self.dist_info, self.stop = model, source, clip, settings, dist_info, stop
        self._normalise = Normalizer(clip.mean, clip.std).to(dist_info.device)
        self._shown: tuple[list[Tensor], list[int]] | None = None  # clips whose merges are drawn, and their classes

    def __call__(self) -> Validation:
        """Validate the network as it is now."""
        evaluation = builders.run_views(
            self.model, self.source.val, self.clip, views=1, crops=1, settings=self.settings, dist_info=self.dist_info, title="validation", stop=self.stop
        )
        bins = [view.bins[0] for view in evaluation.views]
        metrics = {**accuracy(evaluation.views), "bins": sum(bins) / len(bins), "failed": len(evaluation.failed)}
        if not (self.settings.tensorboard_pictures and self.dist_info.is_main):
            return Validation(metrics)
        clips: ClipResults | None = None
        merges: tuple[Image, ...] = ()
        with or_warn("TensorBoard lacks pictures of this validation"):
            table = builders.gflops_table(self.model, self.clip) if self.model.sgs else None
            clips = clip_results(evaluation, layers=list(self.model.sgs), class_names=self.source.class_names, table=table)
            merges = self._merges(evaluation.failed) if self.model.sgs else ()
        return Validation(metrics, clips, merges)

    def _merges(self, failed: Collection[int]) -> tuple[Image, ...]:
        """Draw the merges of a few clips, which are read at the first call."""
        from atfr.viz.clips import merge_pictures  # matplotlib takes a second to import

        if self._shown is None:
            dataset = with_time_limit(TestClips(self.source.val, self.clip, views=1, crops=1), timeout_s=self.settings.timeout_s)
            read = [dataset[number] for number in spread(self.source.val, self.settings.tensorboard_pictures, without=failed)]
            self._shown = [one.clip for one in read if one.clip is not None], [one.label for one in read if one.clip is not None]
        clips, labels = self._shown
        precision = precision_dtype(self.settings.precision, self.dist_info.device)
        return tuple(merge_pictures(self.model, clips, normalise=self._normalise, class_names=self.source.class_names, labels=labels, precision=precision))


def spread(videos: Sequence[Video], count: int, *, without: Collection[int] = ()) -> list[int]:
    """Choose videos of as many classes as possible, spread over the list. Returns their indices.

    Args:
        without: indices of videos that are not chosen.
    """
    seen: Counter[int] = Counter()
    rounds: list[tuple[int, int]] = []  # (how many videos of its class come before it, index)
    for number, video in enumerate(videos):
        if number not in without:
            rounds.append((seen[video.label], number))
            seen[video.label] += 1
    firsts = [number for earlier, number in rounds if earlier == 0]
    if len(firsts) >= count:
        return [firsts[len(firsts) * i // count] for i in range(count)]
    return [number for _, number in sorted(rounds)[:count]]
