"""Datasets of video clips, their settings, and the batches that they are collated into."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from atfr.data.temporal_sampling import (
    random_clip,
    random_clip_by_time,
    random_segments,
    segment_views,
    stride_at_rate,
    uniform_views,
    uniform_views_by_time,
)
from atfr.data.transforms import TrainTransform, test_crops
from atfr.data.types import Unreadable, Video, VideoError
from atfr.data.video.cache import cached
from atfr.data.video.decode import DECODERS, Decoded, Pick, PickByTime, read_clip
from atfr.data.video.timeout import TimeLimit
from atfr.data.warn_once import warn_once
from atfr.utils.paths import expanded

_ATTEMPTS = 10

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """Options of `dataset.clip`: which frames and pixels of a video make a clip, and how it is augmented.

    The annotations are those that OmegaConf can read.

    Raises:
        ValueError: a value is out of range; the message names the field.
    """

    frames: int  # frames per clip
    stride: int  # distance of the frames in the video; not used by segments
    fps: Optional[float] = None  # frame rate that `stride` refers to; None: the rate of each file
    fallback_fps: Optional[float] = None  # rate of videos of unknown rate (frame folders); None: `stride` is not adapted
    sampling: str = "dense"  # dense: frames `stride` apart | segments: one frame from each of `frames` equal parts
    crop_size: int  # pixels; clips are square
    train_short_side: list[int]  # pixels, [lo, hi]: range of the random shorter side
    train_scale: Optional[list[float]] = None  # [lo, hi], area of RandomResizedCrop; None: plain random crop
    flip: float = 0.5  # probability of a horizontal flip; 0 if classes depend on left and right
    randaugment: Optional[list[int]] = None  # [operations, magnitude in 0..30]
    color_jitter: Optional[list[float]] = None  # [brightness, contrast, saturation, hue]
    erasing: Optional[float] = None  # probability of filling a rectangle with the mean colour
    test_short_side: int  # pixels
    views: int = 1  # clips per test video, spread over its length
    crops: int = 1  # crops per test clip: 1 or 3
    mean: list[float]  # per channel, for values in [0, 1]
    std: list[float]
    decoder: str = "pyav"  # library that is tried first: pyav | decord
    cache: Optional[str] = None  # folder of decoded clips, shared by runs with the same seed

    def __post_init__(self) -> None:
        for name in ("frames", "stride", "crop_size", "test_short_side", "views"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        self._require(self.sampling in ("dense", "segments"), "sampling", "dense or segments")
        self._require(self.crops in (1, 3), "crops", "1 or 3")
        self._require(self.decoder in DECODERS, "decoder", f"one of {', '.join(DECODERS)}")
        self._require(0 <= self.flip <= 1, "flip", "a probability in [0, 1]")
        for name in ("fps", "fallback_fps"):
            value = getattr(self, name)
            self._require(value is None or 0 < value < math.inf, name, "above 0, or null")
        self._check_augmentation()
        self._require(self.test_short_side >= self.crop_size, "test_short_side", f"at least crop_size={self.crop_size}")
        side = self.train_short_side
        self._require(len(side) == 2 and 1 <= side[0] <= side[1], "train_short_side", "[lo, hi] with 1 <= lo <= hi")
        if self.train_scale is None:
            self._require(side[0] >= self.crop_size, "train_short_side", f"at least crop_size={self.crop_size}")
        else:
            scale = self.train_scale
            ordered = len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1
            self._require(ordered, "train_scale", "[lo, hi] with 0 < lo <= hi <= 1, or null")
        self._require(len(self.mean) == 3 and all(map(math.isfinite, self.mean)), "mean", "three numbers, one per channel")
        self._require(len(self.std) == 3 and all(0 < value < math.inf for value in self.std), "std", "three positive numbers, one per channel")

    def _check_augmentation(self) -> None:
        rand, jitter, erasing = self.randaugment, self.color_jitter, self.erasing
        good = rand is None or (len(rand) == 2 and rand[0] >= 1 and 0 <= rand[1] <= 30)
        self._require(good, "randaugment", "[operations, magnitude] with operations >= 1 and 0 <= magnitude <= 30, or null")
        good = jitter is None or (len(jitter) == 4 and all(0 <= value < math.inf for value in jitter) and jitter[3] <= 0.5)
        self._require(good, "color_jitter", "[brightness, contrast, saturation, hue], none negative and hue <= 0.5, or null")
        self._require(erasing is None or 0 <= erasing <= 1, "erasing", "a probability in [0, 1], or null")

    def stride_at(self, fps: float | None, *, path: str) -> float:
        """Return the stride in a file with `fps` frames per second (None: unknown)."""
        rate = fps or self.fallback_fps
        if self.fps is not None and rate is None:
            remedy = "set dataset.clip.fallback_fps to the rate of such videos"
            warn_once(log, "rate", f"dataset.clip.fps={self.fps:g} is ignored for {path} and other videos of unknown frame rate; {remedy}")
        return stride_at_rate(self.stride, fps=rate, wanted_fps=self.fps)

    def read(self, path: str, pick: Pick, *, pick_by_time: PickByTime | None = None, short_side: int, key: tuple) -> Decoded:
        """Read the frames that `pick` chooses, through the cache if there is one.

        With `fps`, `pick_by_time` chooses the frames in files of a variable rate. `key` identifies the choice in the cache.
        """
        timed = pick_by_time if self.fps is not None and self.sampling == "dense" else None
        read = partial(read_clip, path, pick, pick_by_time=timed, short_side=short_side, decoder=self.decoder)
        if self.cache is None:
            return read()
        settings = (self.frames, self.stride, self.fps, self.fallback_fps, self.sampling, self.decoder)
        return cached(read, Path(expanded(self.cache, "dataset.clip.cache")), path, (*settings, short_side, *key))

    @property
    def interval(self) -> float:
        """Seconds between the frames of a clip at the rate `fps`."""
        return self.stride / (self.fps or 1)

    def _require(self, holds: bool, name: str, what: str) -> None:
        if not holds:
            raise ValueError(f"dataset.clip.{name} is {getattr(self, name)}, it must be {what}")


@dataclass
class Clip:
    """An item of a dataset. If a test video cannot be read, `clip` is None and `error` is the reason."""

    clip: Optional[Tensor]  # uint8 [C, T, H, W]
    label: int
    video: int  # index into the dataset's videos
    view: int  # view * crops + crop; 0 in training
    path: str
    decoder: str = ""  # library that read it; "" if none did
    bad: tuple[str, ...] = ()  # training: error of each unreadable video that this clip replaces
    error: Optional[str] = None


@dataclass
class Batch:
    """A batch of N clips that could be read, and reports about the others. `clips` is None if N is 0.

    Meets the protocols ClipBatch and EvalBatch.
    """

    clips: Optional[Tensor]  # uint8 [N, C, T, H, W]
    labels: Tensor  # int64 [N]
    videos: Tensor  # int64 [N], indices into the dataset's videos
    views: Tensor  # int64 [N]
    paths: tuple[str, ...]  # N
    decoders: tuple[str, ...]  # N
    bad: tuple[str, ...]  # training: one message per replaced video
    failed: tuple[Unreadable, ...]  # testing: one for each clip that could not be read

    def __len__(self) -> int:
        return len(self.paths)

    def pin_memory(self) -> Batch:
        """Return a copy in page-locked memory. DataLoader calls this if `pin_memory` is set."""
        tensors = {name: getattr(self, name) for name in ("clips", "labels", "videos", "views")}
        return replace(self, **{name: tensor.pin_memory() for name, tensor in tensors.items() if tensor is not None})


class TrainClips(Dataset):
    """A random clip of each video, indexed by (epoch, index).

    All randomness is a function of (seed, epoch, index), so the data depend neither on the number of workers nor on the
    order of access. The video is `index % len(videos)`; a larger index gives another clip of it, as the sampler needs
    if a batch is larger than the dataset. An unreadable video is replaced by a random one and reported in `Clip.bad`.
    The loader sets `limit`.

    Raises:
        VideoError: 10 videos in a row could not be read.
    """

    def __init__(self, videos: Sequence[Video], clip: ClipSettings, *, seed: int) -> None:
        if not videos:
            raise ValueError("there are no training videos")
        self.videos = tuple(videos)
        self.clip = clip
        self.seed = seed
        self.limit = TimeLimit()
        self.transform = TrainTransform(
            crop_size=clip.crop_size,
            short_side=tuple(clip.train_short_side),
            scale=clip.train_scale and tuple(clip.train_scale),
            flip=clip.flip,
            randaugment=clip.randaugment and tuple(clip.randaugment),
            color_jitter=clip.color_jitter and tuple(clip.color_jitter),
            erasing=clip.erasing,
            fill=tuple(round(255 * value) for value in clip.mean),
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
                clip, decoder = self._read(video, seed)
            except VideoError as error:
                last = error  # Python deletes `error` after the block
                bad.append(str(error))
                continue
            chosen = self.videos[video]
            return Clip(clip, chosen.label, video, view=0, path=chosen.path, decoder=decoder, bad=tuple(bad))
        raise VideoError(last.path, f"{last.reason} (the last of {_ATTEMPTS} training videos, none of them readable)")

    def _read(self, video: int, seed: tuple[int, ...]) -> tuple[Tensor, str]:
        path = self.videos[video].path

        def pick(num_frames: int, fps: float | None) -> np.ndarray:
            # A new generator, since `pick` may be called twice and must return the same start.
            time = np.random.default_rng((*seed, 1))
            if self.clip.sampling == "segments":
                return random_segments(num_frames, frames=self.clip.frames, rng=time)
            return random_clip(num_frames, frames=self.clip.frames, stride=self.clip.stride_at(fps, path=path), rng=time)

        def pick_by_time(times: np.ndarray) -> np.ndarray:
            time = np.random.default_rng((*seed, 1))
            return random_clip_by_time(times, frames=self.clip.frames, interval=self.clip.interval, rng=time)

        space = np.random.default_rng((*seed, 2))
        short_side = self.transform.draw_short_side(space)
        read = partial(self.clip.read, path, pick, pick_by_time=pick_by_time, short_side=short_side, key=("train", *seed))
        decoded = self.limit.read(read, number=video, path=path)
        return self.transform(_to_tensor(decoded.frames), short_side=short_side, rng=space), decoded.decoder


class TestClips(Dataset):
    """Every view and crop of each video; item = (video * views + view) * crops + crop.

    An unreadable video is never replaced: its items have `clip=None` and the reason in `error`.
    """

    __test__ = False  # not a pytest class

    def __init__(self, videos: Sequence[Video], clip: ClipSettings, *, views: int, crops: int) -> None:
        if views < 1:
            raise ValueError(f"views is {views}, it must be at least 1")
        if crops not in (1, 3):
            raise ValueError(f"crops is {crops}, it must be 1 or 3")
        self.videos = tuple(videos)
        self.clip = clip
        self.views = views
        self.crops = crops
        # The last view, so that its other crops do not decode it again.
        self._last: tuple[tuple[int, int], tuple[Tensor, str]] | None = None
        self.limit = TimeLimit()

    def __len__(self) -> int:
        return len(self.videos) * self.views * self.crops

    def __getitem__(self, item: int) -> Clip:
        if not 0 <= item < len(self):
            raise IndexError(f"item {item} of {len(self)}")
        number, view = divmod(item, self.views * self.crops)
        video = self.videos[number]
        try:
            frames, decoder = self._frames(number, view // self.crops)
        except VideoError as error:
            return Clip(None, video.label, number, view, video.path, error=error.reason)
        crops = test_crops(frames, short_side=self.clip.test_short_side, crop_size=self.clip.crop_size, crops=self.crops)
        return Clip(crops[view % self.crops], video.label, number, view, video.path, decoder)

    def _frames(self, number: int, view: int) -> tuple[Tensor, str]:
        """Return the frames of a view, uint8 [T, C, H, W], and the decoder that read them."""
        if self._last is not None and self._last[0] == (number, view):
            return self._last[1]
        path = self.videos[number].path

        def pick(num_frames: int, fps: float | None) -> np.ndarray:
            if self.clip.sampling == "segments":
                return segment_views(num_frames, frames=self.clip.frames, views=self.views)[view]
            stride = self.clip.stride_at(fps, path=path)
            return uniform_views(num_frames, frames=self.clip.frames, stride=stride, views=self.views)[view]

        def pick_by_time(times: np.ndarray) -> np.ndarray:
            return uniform_views_by_time(times, frames=self.clip.frames, interval=self.clip.interval, views=self.views)[view]

        read = partial(
            self.clip.read, path, pick, pick_by_time=pick_by_time, short_side=self.clip.test_short_side, key=("test", view, self.views)
        )
        decoded = self.limit.read(read, number=number, path=path)
        found = _to_tensor(decoded.frames), decoded.decoder
        self._last = ((number, view), found) if self.crops > 1 else None
        return found


def collate(clips: Sequence[Clip]) -> Batch:
    """Collate clips into a Batch; clips without frames appear only in `failed`.

    In a worker, default_collate stacks directly into shared memory.
    """
    read = [clip for clip in clips if clip.clip is not None]
    return Batch(
        clips=default_collate([clip.clip for clip in read]) if read else None,
        labels=torch.tensor([clip.label for clip in read], dtype=torch.int64),
        videos=torch.tensor([clip.video for clip in read], dtype=torch.int64),
        views=torch.tensor([clip.view for clip in read], dtype=torch.int64),
        paths=tuple(clip.path for clip in read),
        decoders=tuple(clip.decoder for clip in read),
        bad=tuple(message for clip in clips for message in clip.bad),
        failed=tuple(Unreadable(clip.video, clip.path, clip.error or "") for clip in clips if clip.clip is None),
    )


def _to_tensor(frames: np.ndarray) -> Tensor:
    """Convert frames, uint8 [T, H, W, 3], to a tensor [T, 3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
