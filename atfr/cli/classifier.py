"""Load a trained network and classify videos with it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from atfr.cli import builders, from_checkpoint
from atfr.cli.config import with_resolved_sgs
from atfr.data.clips import ClipSettings, TestClips
from atfr.data.loader import test_loader
from atfr.data.transforms import Normalizer
from atfr.data.types import Video, VideoError
from atfr.engine.calibration import calibrate
from atfr.engine.distributed.comm import DistInfo
from atfr.engine.run import checkpoint
from atfr.models.video_net import VideoNet
from atfr.utils.progress import watched

if TYPE_CHECKING:
    from PIL.Image import Image

Path_ = str | os.PathLike
_View = tuple[Tensor, tuple[int, ...]]  # softmax scores [classes], B' at each layer


@dataclass(frozen=True)
class Classification:
    """What a classifier says of one video, averaged over its views."""

    path: str
    labels: tuple[str, ...]  # the most probable classes, best first
    probabilities: tuple[float, ...]
    bins: tuple[tuple[int, ...], ...]  # B' of each view, one number a layer
    gflops: float  # mean of a view
    dense_gflops: float  # of a view of the dense network

    def __str__(self) -> str:
        kept = " ".join("/".join(map(str, bins)) for bins in self.bins)
        head = f"{self.path}  ({self.gflops:.3g} of {self.dense_gflops:.3g} GFLOPs a view; B' {kept})"
        return "\n".join([head, *(f"  {100 * p:>5.1f} %  {label}" for label, p in zip(self.labels, self.probabilities))])


class Classifier:
    """A trained network with the clips it was trained for. Call it with the path of a video.

    Attributes:
        model: the network, in evaluation mode.
        clip: how frames are taken from a video.
        class_names: of the logits, in their order.
    """

    def __init__(self, model: VideoNet, clip: ClipSettings, class_names: tuple[str, ...]) -> None:
        self.model, self.clip, self.class_names = model.eval(), clip, class_names
        self._device = next(model.parameters()).device
        self._normalise = Normalizer(clip.mean, clip.std).to(self._device)

    def __call__(self, path: Path_, *, top: int = 5) -> Classification:
        """Classify a video by the mean of its views' softmax scores.

        Args:
            top: how many classes to return.

        Raises:
            VideoError: the video cannot be read.
        """
        (result,) = self.classify([path], top=top, batch_size=1)
        if isinstance(result, VideoError):
            raise result
        return result

    def classify(
        self, paths: Sequence[Path_], *, top: int = 5, batch_size: int = 8, workers: int = 0, progress: bool = False
    ) -> Iterator[Classification | VideoError]:
        """Classify several videos, with views of different videos in one batch. Yields the results in the order of `paths`.

        A video that cannot be read gives the error, and the others are classified.
        """
        found: dict[int, list[_View]] = {}
        for video, view in self._views(paths, batch_size=batch_size, workers=workers, progress=progress):
            if isinstance(view, VideoError):
                yield view
                continue
            found.setdefault(video, []).append(view)
            if len(found[video]) == self.clip.views * self.clip.crops:
                yield self._result(os.fspath(paths[video]), found.pop(video), top)

    def each_view(self, path: Path_, *, top: int = 5, batch_size: int = 8) -> list[Classification]:
        """Classify each view of a video alone.

        Raises:
            VideoError: the video cannot be read.
        """
        results = []
        for _, view in self._views([path], batch_size=batch_size):
            if isinstance(view, VideoError):
                raise view
            results.append(self._result(os.fspath(path), [view], top))
        return results

    @torch.inference_mode()
    def _views(self, paths: Sequence[Path_], *, batch_size: int, workers: int = 0, progress: bool = False) -> Iterator[tuple[int, _View | VideoError]]:
        """Yield (number of the video, view) in order; of a video that cannot be read the error, once, in the place of its views."""
        views = TestClips([Video(os.fspath(path), 0) for path in paths], self.clip, views=self.clip.views, crops=self.clip.crops)
        failed: set[int] = set()
        for batch in watched(test_loader(views, batch_size=batch_size, workers=workers), "prediction", unit="batch", shown=progress):
            rows: list[tuple[int, _View | VideoError]] = []
            for one in batch.failed:
                if one.video not in failed:
                    rows.append((one.video, VideoError(one.path, one.reason)))
                failed.add(one.video)
            if batch.clips is not None:
                logits, sampling = self.model(self._normalise(batch.clips.to(self._device)), return_sampling=True)
                scores = logits.float().softmax(dim=1).cpu()
                rows += [(video, (one, bins)) for video, one, bins in zip(batch.videos.tolist(), scores, sampling.bins) if video not in failed]
            yield from sorted(rows, key=lambda row: row[0])

    def _result(self, path: str, views: Sequence[_View], top: int) -> Classification:
        scores, bins = zip(*views)
        best = torch.stack(scores).mean(dim=0).topk(min(top, len(self.class_names)))
        return Classification(
            path=path,
            labels=tuple(self.class_names[i] for i in best.indices.tolist()),
            probabilities=tuple(best.values.tolist()),
            bins=bins,
            gflops=self._gflops(bins),
            dense_gflops=builders.gflops_table(self.model, self.clip).dense,
        )

    def _gflops(self, bins: Sequence[tuple[int, ...]]) -> float:
        """The mean cost of views that keep `bins`."""
        table = builders.gflops_table(self.model, self.clip)
        return float(table.estimate(bins).mean()) if table.frames else table.dense

    def set_budget(self, gflops: float, paths: Iterable[Path_]) -> float:
        """Calibrate the SGS layers on views of these videos so that they cost this share of the dense GFLOPs on average.

        Returns:
            The mean share that these views cost now. With few views it may be well below `gflops`.

        Raises:
            ValueError: none of them can be read, or the network has no SGS or cannot be that cheap.
        """
        views = TestClips([Video(os.fspath(path), 0) for path in paths], self.clip, views=self.clip.views, crops=1)
        clips = (clip.clip for clip in (views[item] for item in range(len(views))) if clip.clip is not None)
        return calibrate(self.model, (self._normalise(clip[None].to(self._device)) for clip in clips), gflops=gflops)

    def picture(self, path: Path_) -> Image:
        """Draw which frames of one of the video's views, the middle one, went together.

        Raises:
            VideoError: the video cannot be read.
        """
        from atfr.viz.clips import merge_pictures  # matplotlib takes a second to import

        clip = TestClips([Video(os.fspath(path), 0)], self.clip, views=self.clip.views, crops=1)[self.clip.views // 2]
        if clip.clip is None:
            raise VideoError(os.fspath(path), clip.error)
        (picture,) = merge_pictures(self.model, [clip.clip], normalise=self._normalise, class_names=self.class_names)
        return picture

    def with_views(self, **changes: object) -> Classifier:
        """Return a classifier of the same network with other `ClipSettings`, such as `views=10`."""
        return Classifier(self.model, replace(self.clip, **changes), self.class_names)  # type: ignore[arg-type]


def load(path: Path_, *, sgs: str | None = None, after: str | None = None, device: str | torch.device | None = None) -> Classifier:
    """Load the network of a run folder (its best checkpoint) or of a checkpoint file.

    Args:
        sgs: a preset that is put into a network that was trained without SGS. Call `set_budget` before the first video.
        after: where it samples; None: as the preset has it.
        device: None: the first GPU if torch sees one, else the CPU.

    Raises:
        FileNotFoundError, ValueError: there is no such checkpoint, it cannot be read, or it has SGS already.
    """
    file = from_checkpoint.checkpoint_file(os.fspath(path))
    state = from_checkpoint.read(Path(file))
    config = OmegaConf.create(state["config"])
    info = DistInfo(0, 1, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    model = from_checkpoint.trained_model(config, state, file, info) if sgs is None else _with_sgs(config, state, Path(file), info, sgs, after)
    return Classifier(model, builders.clip_settings(config), tuple(state["class_names"]))


def _with_sgs(config: DictConfig, state: dict, file: Path, info: DistInfo, sgs: str, after: str | None) -> VideoNet:
    """Build the checkpoint's network, which has no SGS, with the preset."""
    if with_resolved_sgs(config.model).get("sgs") is not None:
        raise ValueError(f"checkpoint {file} has SGS of its own; leave out sgs={sgs}")
    OmegaConf.update(config, "model.sgs", {"preset": sgs, "after": after}, force_add=True)
    config.model = with_resolved_sgs(config.model)
    model = builders.build_model(config, num_classes=len(state["class_names"]), dist_info=info)
    checkpoint.load_weights(model.dense_network, state["model"], file)
    return model
