"""Index of the frames of a video file: their number, their times, and the keyframes to seek to.

Headers are often wrong about the number of frames and the duration, so the index is built from the packets. Reading all
packets of a long file is slow. Two mechanisms avoid it:

- An mp4 or mov file has a table of its packets with decoding times (dts), not display times (pts). In nearly all files
  the sorted pts are the dts plus a constant. This is assumed, and `AvVideo.read` checks it for the frames that it returns.
- `index_cache` keeps the indices of recently read files in each process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

# Old MPEG-4 (DivX) files pack two frames into one packet, followed by a placeholder of a few bytes that has a timestamp
# but no frame. In such files, frames are counted from the start, without seeking.
_PLACEHOLDER_BYTES = 16
# Frames per second. A higher rate with one clock tick per frame is the clock's rate, as in a header with 90000.
_FASTEST = 10_000
_CACHED_FRAMES = 1 << 20  # at most about 40 MB per process, if every frame is a keyframe


class Keyframe(NamedTuple):
    """A frame that decoding can start from."""

    position: int  # in display order
    packet: int  # in decoding order
    timestamp: int  # to seek to


@dataclass(frozen=True)
class FrameIndex:
    """The frames of a file. `exact` is False if `pts` and keyframe positions are derived from the dts."""

    num_frames: int
    pts: np.ndarray  # int64 [num_frames], increasing; empty unless each frame has its own timestamp
    keys: np.ndarray  # int64 [keyframes, 3], the fields of Keyframe, sorted by position
    time_base: Fraction | None  # seconds
    header_rate: Fraction | None
    exact: bool = True

    def position(self, pts: int | None) -> int | None:
        """Return the position of the frame with this timestamp, or None."""
        if pts is None:
            return None
        position = int(np.searchsorted(self.pts, pts))
        return position if position < len(self.pts) and self.pts[position] == pts else None

    def keyframe_before(self, position: int) -> Keyframe | None:
        """Return the last keyframe at or before a position, or None."""
        number = int(np.searchsorted(self.keys[:, 0], position, side="right")) - 1
        return Keyframe(*self.keys[number].tolist()) if number >= 0 else None

    @cached_property
    def fps(self) -> float | None:
        """Mean rate, or None if unknown; from the timestamps if possible, since headers can be wrong."""
        steps, mean = len(self.pts) - 1, None
        if steps > 0 and self.time_base:
            ticks = int(self.pts[-1] - self.pts[0])
            rate = steps / (ticks * self.time_base)
            mean = float(rate) if ticks > steps else valid_rate(rate)
        return mean or valid_rate(self.header_rate)

    @cached_property
    def times(self) -> np.ndarray | None:
        """Seconds from the first frame, float64 [num_frames]; None at a constant rate or if unknown."""
        if not self.time_base or self.fps is None:
            return None
        return times_if_variable((self.pts - self.pts[:1]) * float(self.time_base))


def valid_rate(fps: Any) -> float | None:
    """Return frames per second as a float, or None if the value from a header is invalid."""
    return float(fps) if fps and 0 < fps < _FASTEST else None


def times_if_variable(times: np.ndarray) -> np.ndarray | None:
    """Return the times of frames, float64 [T], if the rate is variable, else None.

    Variable: a frame is at least one mean interval away from its time at a constant rate. Less may be rounding, jitter or
    a missing frame.
    """
    if len(times) < 3 or not times[-1] > times[0] or (np.diff(times) < 0).any():
        return None
    interval = (times[-1] - times[0]) / (len(times) - 1)
    late = np.abs(times - times[0] - interval * np.arange(len(times)))
    return times if late.max() >= interval else None


def index_from_packets(packets: Sequence[tuple[int | None, bool, int]], *, codec: str, **about: Any) -> FrameIndex:
    """Build an index from (pts, is keyframe, bytes) of all packets, in decoding order. `about`: time_base and header_rate."""
    pts = [packet[0] for packet in packets]
    packed = codec == "mpeg4" and min(packet[2] for packet in packets) <= _PLACEHOLDER_BYTES
    if packed or None in pts or len(set(pts)) < len(pts):
        return FrameIndex(len(packets), np.empty(0, np.int64), np.empty((0, 3), np.int64), **about)
    order = np.argsort(np.array(pts, np.int64))
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    keys = sorted((int(position[number]), number, value) for number, (value, is_key, _) in enumerate(packets) if is_key)
    return FrameIndex(len(packets), np.array(pts, np.int64)[order], np.array(keys, np.int64).reshape(-1, 3), **about)


def index_from_table(container: Any, stream: Any, **about: Any) -> FrameIndex | None:
    """Build an index from the packet table of an mp4 or mov file.

    Return None if the table is not sufficient: fragmented or truncated files, edit lists that drop frames, reordered
    frames at a variable rate.
    """
    table = getattr(stream, "index_entries", ())  # older versions of PyAV do not expose it
    if not container.format.name.startswith("mov") or not 0 < len(table) == stream.frames:
        return None
    entries = list(table)
    # By column, which is faster: a long file has several 100,000 entries.
    columns = ("timestamp", "size", "pos", "is_keyframe", "is_discard")
    dts, sizes, offsets, is_key, discarded = (np.array([getattr(e, name) for e in entries], np.int64) for name in columns)
    steps = np.diff(dts)
    if sizes.min() <= _PLACEHOLDER_BYTES * (stream.codec_context.name == "mpeg4") or discarded.any() or (steps <= 0).any():
        return None
    if (offsets + sizes).max() > container.size or (stream.codec_context.has_b_frames and (steps != steps[:1]).any()):
        return None
    if stream.start_time is None or not is_key[0]:
        return None
    numbers, pts = np.flatnonzero(is_key), dts + (stream.start_time - dts[0])
    return FrameIndex(len(entries), pts, np.stack([numbers, numbers, pts[numbers]], axis=1), exact=False, **about)


class IndexCache:
    """The indices of recently read files, up to a total number of frames."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._indices: dict[tuple, FrameIndex] = {}  # oldest first
        self._frames = 0

    def get(self, path: str, build: Callable[[], FrameIndex]) -> FrameIndex:
        """Return the cached index of a file; call `build` if there is none or the file has changed."""
        key = _state(path)
        with self._lock:
            index = self._indices.get(key)
        return self._add(key, index or build())

    def replace(self, path: str, index: FrameIndex) -> FrameIndex:
        """Replace the cached index of a file."""
        return self._add(_state(path), index)

    def _add(self, key: tuple, index: FrameIndex) -> FrameIndex:
        with self._lock:
            before = self._indices.pop(key, None)
            self._indices[key] = index
            self._frames += index.num_frames - (before.num_frames if before else 0)
            while self._frames > _CACHED_FRAMES and len(self._indices) > 1:
                self._frames -= self._indices.pop(next(iter(self._indices))).num_frames
        return index


def _state(path: str) -> tuple:
    found = os.stat(path)
    return os.path.abspath(path), found.st_size, found.st_mtime_ns, found.st_ino


index_cache = IndexCache()
