"""Which frames of a video make a clip: pure functions on frame numbers and times.

A dense clip is `frames` frames taken every `stride` frames, so it spans `(frames - 1) * stride + 1` frames of the video.
The stride may be a fraction (`stride_at`): each frame is then the one nearest to where it would fall.
Where a rate is wanted and the file's own varies, `random_clip_by_time` and `uniform_views_by_time` do the same with the
frames' times: a clip spans `(frames - 1) * interval` seconds wherever it lies, and its start is uniform in time.
**A video shorter than the span** is read from its first frame on, at the full stride, and its last frame is repeated
until the clip is full. PySlowFast does the same, so clips of short videos mean the same thing here and there.

A clip of segments spans the whole video: this is cut into `frames` segments of equally many frames, as TSN does whatever the
rate, and each gives one frame. In a video with fewer frames than segments, some frames stand for several of them.
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
    _require_counts(views=views)
    last_start = _last_start(num_frames, frames=frames, stride=stride)
    if views == 1:
        starts = [last_start // 2]
    else:
        starts = [round(view * last_start / (views - 1)) for view in range(views)]
    return [_clip_at(start, num_frames, frames=frames, stride=stride) for start in starts]


def random_clip_by_time(times: np.ndarray, *, frames: int, interval: float, rng: np.random.Generator) -> np.ndarray:
    """One clip at a uniformly random time: int64 indices [frames] of the frames nearest to every `interval` seconds.

    `times`, float64 [num_frames], rise; they are the seconds of the frames. Raises ValueError when a count is below 1 or the
    interval not above 0.
    """
    return _nearest(times, rng.random() * _last_time(times, frames=frames, interval=interval), frames=frames, interval=interval)


def uniform_views_by_time(times: np.ndarray, *, frames: int, interval: float, views: int) -> list[np.ndarray]:
    """`views` clips as in `random_clip_by_time`, with starts spread evenly in time from the first possible one to the last.

    A single view is the centre of the video.
    """
    _require_counts(views=views)
    last = _last_time(times, frames=frames, interval=interval)
    starts = [last / 2] if views == 1 else np.linspace(0, last, views)
    return [_nearest(times, start, frames=frames, interval=interval) for start in starts]


def random_segments(num_frames: int, *, frames: int, rng: np.random.Generator) -> np.ndarray:
    """A uniformly random frame of each of `frames` equal segments: int64 indices [frames] in [0, num_frames), rising.

    Raises ValueError when a count is below 1.
    """
    _require_counts(num_frames=num_frames, frames=frames)
    positions = (np.arange(frames) + rng.random(frames)) * num_frames / frames
    return np.minimum(positions.astype(np.int64), num_frames - 1)


def segment_views(num_frames: int, *, frames: int, views: int) -> list[np.ndarray]:
    """`views` clips with a frame of each of `frames` equal segments, the same place in all of them.

    The places are the centres of `views` equal parts of a segment, so a single view has the centres of the segments, and
    views differ where a segment has as many frames as there are views. Returns `views` int64 arrays [frames] with
    values in [0, num_frames). Raises ValueError when a count is below 1.
    """
    _require_counts(num_frames=num_frames, frames=frames, views=views)
    # In integers: (segment + (view + 1/2) / views) * num_frames / frames, rounded down.
    segments = 2 * views * np.arange(frames, dtype=np.int64)
    return [(segments + 2 * view + 1) * num_frames // (2 * views * frames) for view in range(views)]


def _last_start(num_frames: int, *, frames: int, stride: float) -> int:
    _require_counts(num_frames=num_frames, frames=frames)
    if not stride > 0:
        raise ValueError(f"stride is {stride}, it must be above 0")
    return max(0, num_frames - 1 - int(_offsets(frames, stride)[-1]))


def _clip_at(start: int, num_frames: int, *, frames: int, stride: float) -> np.ndarray:
    return np.minimum(start + _offsets(frames, stride), num_frames - 1)


def _last_time(times: np.ndarray, *, frames: int, interval: float) -> float:
    """The last start, in seconds from the first frame, of a clip that ends in the video; 0 if none does."""
    _require_counts(num_frames=len(times), frames=frames)
    if not interval > 0:
        raise ValueError(f"interval is {interval}, it must be above 0")
    return max(0.0, float(times[-1] - times[0]) - (frames - 1) * interval)


def _nearest(times: np.ndarray, start: float, *, frames: int, interval: float) -> np.ndarray:
    wanted = times[0] + start + interval * np.arange(frames)
    return np.searchsorted((times[1:] + times[:-1]) / 2, wanted, side="right").astype(np.int64)


def _offsets(frames: int, stride: float) -> np.ndarray:
    return np.floor(stride * np.arange(frames) + 0.5).astype(np.int64)


def _require_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, it must be at least 1")
