"""Clips of videos as torch datasets, and the batches they are collated into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Optional

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from atfr.data.decode import DECODERS, read_clip
from atfr.data.records import Video, VideoError
from atfr.data.sampling import random_clip, uniform_views
from atfr.data.transforms import TrainTransform, test_crops

_ATTEMPTS = 10


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """How a clip is cut out of a video, in time and in space.

    Plain annotations, so that OmegaConf can read it. Raises ValueError, naming the field, for values that make no
    sense.
    """

    frames: int  # frames in a clip
    stride: int  # one frame of the video in so many
    crop_size: int  # pixels; clips are square
    train_short_side: list[int]  # pixels, (lo, hi): the shorter side is drawn between them
    train_scale: Optional[list[float]] = None  # area range of RandomResizedCrop; None: a plain random crop
    flip: float = 0.5  # probability of a horizontal flip; 0 where left and right have a meaning
    test_short_side: int  # pixels
    views: int = 1  # clips a test video, spread over its length
    crops: int = 1  # 1 or 3 crops a clip
    mean: list[float]  # per channel, for values in [0, 1]
    std: list[float]
    decoder: str = "pyav"  # the library that reads first: pyav | decord

    def __post_init__(self) -> None:
        for name in ("frames", "stride", "crop_size", "test_short_side", "views"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        self._require(self.crops in (1, 3), "crops", "1 or 3")
        self._require(self.decoder in DECODERS, "decoder", f"one of {', '.join(DECODERS)}")
        self._require(0 <= self.flip <= 1, "flip", "a probability in [0, 1]")
        self._require(self.test_short_side >= self.crop_size, "test_short_side", f"at least crop_size={self.crop_size}")
        side = self.train_short_side
        self._require(len(side) == 2 and 1 <= side[0] <= side[1], "train_short_side", "[lo, hi] with 1 <= lo <= hi")
        if self.train_scale is None:
            self._require(side[0] >= self.crop_size, "train_short_side", f"at least crop_size={self.crop_size}")
        else:
            scale = self.train_scale
            ordered = len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1
            self._require(ordered, "train_scale", "[lo, hi] with 0 < lo <= hi <= 1, or null")
        self._require(len(self.mean) == 3, "mean", "three numbers, one a channel")
        self._require(len(self.std) == 3 and min(self.std) > 0, "std", "three positive numbers, one a channel")

    def _require(self, holds: bool, name: str, what: str) -> None:
        if not holds:
            raise ValueError(f"dataset.clip.{name} is {getattr(self, name)}, it must be {what}")


@dataclass
class Clip:
    """One item of a dataset. `clip` is None where a test video could not be read; `error` then says why."""

    clip: Optional[Tensor]  # uint8 [C, T, H, W]
    label: int
    video: int  # index into the dataset's videos
    view: int  # running index over views x crops; 0 in training
    path: str
    bad: tuple[str, ...] = ()  # training: what was wrong with the videos that this one stands in for
    error: Optional[str] = None


@dataclass
class Batch:
    """Clips that could be read, stacked, and what is to be reported about the others.

    N counts the clips that could be read; `clips` is None when there are none.
    """

    clips: Optional[Tensor]  # uint8 [N, C, T, H, W]
    labels: Tensor  # int64 [N]
    videos: Tensor  # int64 [N], indices into the dataset's videos
    views: Tensor  # int64 [N]
    paths: tuple[str, ...]  # N
    bad: tuple[str, ...]  # training: one message for each video that was replaced
    failed: tuple[tuple[str, str], ...]  # testing: (path, reason) of each clip that could not be read

    def __len__(self) -> int:
        return len(self.paths)

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory; DataLoader calls this when it is asked to pin."""
        return self._with_tensors(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Batch:
        """A copy whose tensors are on `device`."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def _with_tensors(self, move) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: move(value) for name, value in values.items() if isinstance(value, Tensor)})


class TrainClips(Dataset):
    """A random clip of every video, indexed by (epoch, index).

    Everything random is a function of (seed, epoch, index), so neither the number of workers nor the order of access
    changes the data. `index` may exceed the number of videos: `index % len(videos)` is the video, and the clip is
    another one (the sampler wraps around that way when a batch is larger than the data).
    A video that cannot be read is replaced by another one, drawn from the same seed, and reported in `Clip.bad`;
    VideoError after 10 of them.
    """

    def __init__(self, videos: Sequence[Video], clip: ClipSettings, *, seed: int) -> None:
        if not videos:
            raise ValueError("there are no training videos")
        self.videos = tuple(videos)
        self.clip = clip
        self.seed = seed
        self.transform = TrainTransform(
            crop_size=clip.crop_size,
            short_side=(clip.train_short_side[0], clip.train_short_side[1]),
            scale=None if clip.train_scale is None else (clip.train_scale[0], clip.train_scale[1]),
            flip=clip.flip,
        )

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: tuple[int, int]) -> Clip:
        epoch, index = key
        video = index % len(self.videos)
        bad: list[str] = []
        for attempt in range(_ATTEMPTS):
            seed = (self.seed, epoch, index, attempt)
            if attempt > 0:
                video = int(np.random.default_rng((*seed, 0)).integers(len(self.videos)))
            try:
                clip = self._read(self.videos[video], seed)
            except VideoError as error:
                last = error  # Python forgets `error` after the block
                bad.append(str(error))
                continue
            chosen = self.videos[video]
            return Clip(clip, chosen.label, video, view=0, path=chosen.path, bad=tuple(bad))
        raise VideoError(last.path, f"{last.reason} (the last of {_ATTEMPTS} training videos, none of them readable)")

    def _read(self, video: Video, seed: tuple[int, ...]) -> Tensor:
        def pick(num_frames: int) -> np.ndarray:
            # Its own generator: asked twice, it must not shift what the transform draws.
            time = np.random.default_rng((*seed, 1))
            return random_clip(num_frames, frames=self.clip.frames, stride=self.clip.stride, rng=time)

        space = np.random.default_rng((*seed, 2))
        short_side = self.transform.draw_short_side(space)
        frames = _to_tensor(read_clip(video.path, pick, short_side=short_side, decoder=self.clip.decoder))
        return self.transform(frames, short_side=short_side, rng=space)


class TestClips(Dataset):
    """Every view and crop of every video; item = (video * views + view) * crops + crop.

    A video that cannot be read is never replaced: its items have `clip=None` and say why in `error`.
    """

    __test__ = False  # pytest would take the name for a test case

    def __init__(self, videos: Sequence[Video], clip: ClipSettings, *, views: int, crops: int) -> None:
        if views < 1:
            raise ValueError(f"views is {views}, it must be at least 1")
        if crops not in (1, 3):
            raise ValueError(f"crops is {crops}, it must be 1 or 3")
        self.videos = tuple(videos)
        self.clip = clip
        self.views = views
        self.crops = crops
        # The view last read: its other crops, next in order, need not decode it again.
        self._last: tuple[tuple[int, int], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.videos) * self.views * self.crops

    def __getitem__(self, item: int) -> Clip:
        if not 0 <= item < len(self):
            raise IndexError(f"item {item} of {len(self)}")
        number, view = divmod(item, self.views * self.crops)
        video = self.videos[number]
        try:
            frames = self._frames(number, view // self.crops)
        except VideoError as error:
            return Clip(None, video.label, number, view, video.path, error=error.reason)
        crops = test_crops(
            frames, short_side=self.clip.test_short_side, crop_size=self.clip.crop_size, crops=self.crops
        )
        return Clip(crops[view % self.crops], video.label, number, view, video.path)

    def _frames(self, number: int, view: int) -> Tensor:
        """uint8 [T, C, H, W] of one view of one video."""
        if self._last is not None and self._last[0] == (number, view):
            return self._last[1]

        def pick(num_frames: int) -> np.ndarray:
            spread = uniform_views(num_frames, frames=self.clip.frames, stride=self.clip.stride, views=self.views)
            return spread[view]

        path, clip = self.videos[number].path, self.clip
        frames = _to_tensor(read_clip(path, pick, short_side=clip.test_short_side, decoder=clip.decoder))
        self._last = ((number, view), frames) if self.crops > 1 else None
        return frames


def collate(clips: Sequence[Clip]) -> Batch:
    """Clips -> Batch; those without frames are in `failed` only."""
    read = [clip for clip in clips if clip.clip is not None]
    return Batch(
        clips=torch.stack([clip.clip for clip in read]) if read else None,
        labels=torch.tensor([clip.label for clip in read], dtype=torch.int64),
        videos=torch.tensor([clip.video for clip in read], dtype=torch.int64),
        views=torch.tensor([clip.view for clip in read], dtype=torch.int64),
        paths=tuple(clip.path for clip in read),
        bad=tuple(message for clip in clips for message in clip.bad),
        failed=tuple((clip.path, clip.error or "") for clip in clips if clip.clip is None),
    )


def _to_tensor(frames: np.ndarray) -> Tensor:
    """uint8 [T, H, W, 3] -> uint8 [T, 3, H, W], a view."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
