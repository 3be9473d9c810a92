"""Choose the frames of a video that make a clip: pure functions of frame indices and times.

Dense clips take `frames` frames, `stride` apart, and span `(frames - 1) * stride + 1` frames of the video. The stride may
be a fraction (`stride_at_rate`); indices are then rounded. In files of a variable rate, the functions `*_by_time` work on
times instead of indices: a clip spans `(frames - 1) * interval` seconds, and its start is uniform in time.
A video shorter than that is read from its first frame at the full stride, and its last frame is repeated, as in PySlowFast.

Segment clips span the whole video (TSN): one frame from each of `frames` equal segments. In a video with fewer frames
than segments, some frames repeat.
"""

from __future__ import annotations

import numpy as np


def stride_at_rate(stride: int, *, fps: float | None, wanted_fps: float | None) -> float:
    """Return the stride at `fps` that spans the same time as `stride` at `wanted_fps`.

    If either rate is None, return `stride`.
    """
    return stride if wanted_fps is None or fps is None else stride * fps / wanted_fps


def random_clip(num_frames: int, *, frames: int, stride: float, rng: np.random.Generator) -> np.ndarray:
    """Choose a clip with a uniformly random start: int64 indices [frames] in [0, num_frames).

    Raises:
        ValueError: a count is below 1, or the stride is not above 0.
    """
    last_start = _last_start(num_frames, frames=frames, stride=stride)
    return _clip_at(int(rng.integers(last_start + 1)), num_frames, frames=frames, stride=stride)


def uniform_views(num_frames: int, *, frames: int, stride: float, views: int) -> list[np.ndarray]:
    """Choose `views` clips with evenly spaced starts, from the first possible start to the last.

    A single view is the centre of the video. Returns and raises as `random_clip`, with one array per view.
    """
    _require_counts(views=views)
    last_start = _last_start(num_frames, frames=frames, stride=stride)
    if views == 1:
        starts = [last_start // 2]
    else:
        starts = [round(view * last_start / (views - 1)) for view in range(views)]
    return [_clip_at(start, num_frames, frames=frames, stride=stride) for start in starts]


def random_clip_by_time(times: np.ndarray, *, frames: int, interval: float, rng: np.random.Generator) -> np.ndarray:
    """Choose a clip with a start uniform in time: int64 indices [frames] of the frames nearest to every `interval` seconds.

    `times`, float64 [num_frames], are the increasing times of the frames in seconds.

    Raises:
        ValueError: a count is below 1, or the interval is not above 0.
    """
    return _nearest(times, rng.random() * _last_time(times, frames=frames, interval=interval), frames=frames, interval=interval)


def uniform_views_by_time(times: np.ndarray, *, frames: int, interval: float, views: int) -> list[np.ndarray]:
    """Choose `views` clips as `random_clip_by_time`, with starts evenly spaced in time from the first possible to the last.

    A single view is the centre of the video.
    """
    _require_counts(views=views)
    last = _last_time(times, frames=frames, interval=interval)
    starts = [last / 2] if views == 1 else np.linspace(0, last, views)
    return [_nearest(times, start, frames=frames, interval=interval) for start in starts]


def random_segments(num_frames: int, *, frames: int, rng: np.random.Generator) -> np.ndarray:
    """Choose a uniformly random frame of each of `frames` equal segments: sorted int64 indices [frames].

    Raises:
        ValueError: a count is below 1.
    """
    _require_counts(num_frames=num_frames, frames=frames)
    positions = (np.arange(frames) + rng.random(frames)) * num_frames / frames
    return np.minimum(positions.astype(np.int64), num_frames - 1)


def segment_views(num_frames: int, *, frames: int, views: int) -> list[np.ndarray]:
    """Choose `views` clips; view v takes from each of `frames` equal segments the centre of its v-th of `views` equal parts.

    A single view takes the centres of the segments. Returns and raises as `random_segments`, with one array per view.
    """
    _require_counts(num_frames=num_frames, frames=frames, views=views)
    # Integer arithmetic for (segment + (view + 1/2) / views) * num_frames / frames, rounded down.
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
    """Return the last possible start in seconds from the first frame; 0 if no clip fits."""
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
