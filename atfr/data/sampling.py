"""Which frames of a video make a clip: pure functions on integers.

A clip is `frames` frames taken every `stride` frames, so it spans `(frames - 1) * stride + 1` frames of the video.
The stride may be a fraction (`stride_at`): each frame is then the one nearest to where it would fall.
**A video shorter than the span** is read from its first frame on, at the full stride, and its last frame is repeated
until the clip is full. PySlowFast does the same, so clips of short videos mean the same thing here and there.
"""

from __future__ import annotations

import numpy as np


def stride_at(stride: int, *, fps: float | None, wanted_fps: float | None) -> float:
    """The stride in a file of `fps` frames a second that spans the time that `stride` spans at `wanted_fps`.

    It is `stride` itself where nothing is wanted or the file's rate is not known.
    """
    return stride if wanted_fps is None or fps is None else stride * fps / wanted_fps


def random_clip(num_frames: int, *, frames: int, stride: float, rng: np.random.Generator) -> np.ndarray:
    """One clip at a uniformly random start: int64 indices [frames] in [0, num_frames).

    Raises ValueError when a count is below 1 or the stride not above 0.
    """
    last_start = _last_start(num_frames, frames=frames, stride=stride)
    return _clip_at(int(rng.integers(last_start + 1)), num_frames, frames=frames, stride=stride)


def uniform_views(num_frames: int, *, frames: int, stride: float, views: int) -> list[np.ndarray]:
    """`views` clips whose starts are spread evenly from the first possible one to the last, both included.

    A single view is the centre of the video. Returns `views` int64 arrays [frames] with values in [0, num_frames).
    Raises ValueError when a count is below 1 or the stride not above 0.
    """
    if views < 1:
        raise ValueError(f"views is {views}, it must be at least 1")
    last_start = _last_start(num_frames, frames=frames, stride=stride)
    if views == 1:
        starts = [last_start // 2]
    else:
        starts = [round(view * last_start / (views - 1)) for view in range(views)]
    return [_clip_at(start, num_frames, frames=frames, stride=stride) for start in starts]


def _last_start(num_frames: int, *, frames: int, stride: float) -> int:
    for name, value in (("num_frames", num_frames), ("frames", frames)):
        if value < 1:
            raise ValueError(f"{name} is {value}, it must be at least 1")
    if not stride > 0:
        raise ValueError(f"stride is {stride}, it must be above 0")
    return max(0, num_frames - 1 - int(_offsets(frames, stride)[-1]))


def _clip_at(start: int, num_frames: int, *, frames: int, stride: float) -> np.ndarray:
    return np.minimum(start + _offsets(frames, stride), num_frames - 1)


def _offsets(frames: int, stride: float) -> np.ndarray:
    return np.floor(stride * np.arange(frames) + 0.5).astype(np.int64)
