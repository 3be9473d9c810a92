"""Where the frames of a video file are: their number, their times, and the keyframes to seek to.

A header's number of frames and duration are often wrong, so an index is built from the packets. Reading every packet of
a long file is slow. Two mechanisms avoid it:

- An mp4 or mov file has a table of its packets. It holds decoding times (dts), not display times (pts). The pts of nearly
  all files are the dts plus a constant: that is assumed, and `AvVideo.read` checks it for the frames that it returns.
- `index_cache` keeps the indices of the files last read, in each process.
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

# MPEG-4 clips of the DivX era pack two frames into one packet and follow it with a placeholder of a few bytes, which
# has a timestamp but no frame. Such files are counted from the start, never sought in.
_PLACEHOLDER_BYTES = 16
# Frames per second. A rate above it that counts one tick of the clock per frame is the clock's rate, as in a header that
# gives 90000.
_FASTEST = 10_000
_CACHED_FRAMES = 1 << 20  # up to about 40 MB in each process, where every frame is a keyframe


class Keyframe(NamedTuple):
    """A frame that decoding can begin at."""

    position: int  # in display order
    packet: int  # in decoding order
    timestamp: int  # to seek to


@dataclass(frozen=True)
class FrameIndex:
    """The frames of one file. `exact` is False where `pts` and the positions of keyframes are assumed from the dts."""

    num_frames: int
    pts: np.ndarray  # int64 [num_frames], rising; empty where not every frame has a timestamp of its own
    keys: np.ndarray  # int64 [keyframes, 3], the fields of Keyframe, by position
    time_base: Fraction | None  # seconds
    header_rate: Fraction | None
    exact: bool = True

    def position(self, pts: int | None) -> int | None:
        """Return the position of the frame with this timestamp, None if there is none."""
        if pts is None:
            return None
        place = int(np.searchsorted(self.pts, pts))
        return place if place < len(self.pts) and self.pts[place] == pts else None

    def keyframe_before(self, position: int) -> Keyframe | None:
        """Return the last keyframe at or before a position."""
        place = int(np.searchsorted(self.keys[:, 0], position, side="right")) - 1
        return Keyframe(*self.keys[place].tolist()) if place >= 0 else None

    @cached_property
    def fps(self) -> float | None:
        """Mean rate, None if it is not known.

        The timestamps decide, since a header can be wrong about the duration and the rate.
        """
        steps, mean = len(self.pts) - 1, None
        if steps > 0 and self.time_base:
            ticks = int(self.pts[-1] - self.pts[0])
            rate = steps / (ticks * self.time_base)
            mean = float(rate) if ticks > steps else possible_rate(rate)
        return mean or possible_rate(self.header_rate)

    @cached_property
    def times(self) -> np.ndarray | None:
        """float64 [num_frames], seconds from the first frame; None at a constant rate, or where times are not known."""
        if not self.time_base or self.fps is None:
            return None
        return uneven((self.pts - self.pts[:1]) * float(self.time_base))


def possible_rate(fps: Any) -> float | None:
    """Return frames per second as a float, or None for what no video has: headers hold zeros and nonsense."""
    return float(fps) if fps and 0 < fps < _FASTEST else None


def uneven(times: np.ndarray) -> np.ndarray | None:
    """Return the times of frames, float64 [T], if a frame is at least one mean interval away from its time at a constant rate.

    Return None otherwise: timestamps of a constant rate are rounded, those of some cameras jitter, and a frame may be missing.
    """
    if len(times) < 3 or not times[-1] > times[0] or (np.diff(times) < 0).any():
        return None
    interval = (times[-1] - times[0]) / (len(times) - 1)
    late = np.abs(times - times[0] - interval * np.arange(len(times)))
    return times if late.max() >= interval else None


def from_packets(packets: Sequence[tuple[int | None, bool, int]], *, codec: str, **about: Any) -> FrameIndex:
    """Build the index from (pts, keyframe or not, bytes) of every packet, in decoding order. `about` is the rest of it."""
    pts = [packet[0] for packet in packets]
    packed = codec == "mpeg4" and min(packet[2] for packet in packets) <= _PLACEHOLDER_BYTES
    if packed or None in pts or len(set(pts)) < len(pts):
        return FrameIndex(len(packets), np.empty(0, np.int64), np.empty((0, 3), np.int64), **about)
    order = np.argsort(np.array(pts, np.int64))
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    keys = sorted((int(position[number]), number, value) for number, (value, is_key, _) in enumerate(packets) if is_key)
    return FrameIndex(len(packets), np.array(pts, np.int64)[order], np.array(keys, np.int64).reshape(-1, 3), **about)


def from_container(container: Any, stream: Any, **about: Any) -> FrameIndex | None:
    """Build the index from the table of an mp4 or mov file.

    Return None if the table is not reliable: fragmented or truncated files, edit lists that drop frames, reordered
    frames at a variable rate.
    """
    table = getattr(stream, "index_entries", ())  # older versions of PyAV have none
    if not container.format.name.startswith("mov") or not 0 < len(table) == stream.frames:
        return None
    entries = list(table)
    # A column at a time, which is quicker: a long file has several 100,000 entries.
    columns = ("timestamp", "size", "pos", "is_keyframe", "is_discard")
    dts, sizes, places, is_key, discarded = (np.array([getattr(e, name) for e in entries], np.int64) for name in columns)
    steps = np.diff(dts)
    if sizes.min() <= _PLACEHOLDER_BYTES * (stream.codec_context.name == "mpeg4") or discarded.any() or (steps <= 0).any():
        return None
    if (places + sizes).max() > container.size or (stream.codec_context.has_b_frames and (steps != steps[:1]).any()):
        return None
    if stream.start_time is None or not is_key[0]:
        return None
    numbers, pts = np.flatnonzero(is_key), dts + (stream.start_time - dts[0])
    return FrameIndex(len(entries), pts, np.stack([numbers, numbers, pts[numbers]], axis=1), exact=False, **about)


class IndexCache:
    """The indices of the files read last, up to a total number of frames."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._indices: dict[tuple, FrameIndex] = {}  # the oldest first
        self._frames = 0

    def get(self, path: str, build: Callable[[], FrameIndex]) -> FrameIndex:
        """Return the index of a file as it is now, from `build` if it is not cached."""
        key = _state(path)
        with self._lock:
            index = self._indices.get(key)
        return self._add(key, index or build())

    def replace(self, path: str, index: FrameIndex) -> FrameIndex:
        """Keep another index of a file."""
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
