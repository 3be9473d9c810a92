"""The two libraries that decode videos, behind one small interface.

A reader opens a file in its constructor. `num_frames` is the number of frames to expect, `fps` their mean rate (None: not
known), and `times` the seconds of each from the first on where the rate varies (None: it does not, or is not known).
All three come from `index`, if the reader has one: a read that finds it wrong replaces it.
`read(wanted, short_side)` returns the frames at the positions `wanted` (sorted, in display order). A file may stay open in
between, so no reader may live through a fork.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from typing import Any

import numpy as np

from atfr.data.types import VideoError
from atfr.data.video.frame_index import FrameIndex, Keyframe, from_container, from_packets, index_cache, possible_rate, uneven

# What a read gives back: the frames found, by position, and the true number of frames if the read met the end. The
# last frame that decodes is then among the frames, wanted or not.
Found = tuple[dict[int, np.ndarray], "int | None"]

# A decoder's error this close to the end of the file is the end of the video; before that the video is bad.
_TAIL_SHARE = 0.1
# Seeking pays when it saves decoding this many frames: it costs about as much as one or two.
_WORTH_SEEKING = 4
# Seconds; a timestamp beyond is nonsense.
_LONGEST = 1e7


class Unsupported(VideoError):
    """The library, not the file, is at fault: another one may read it."""


def scaled_size(width: int, height: int, short_side: int | None, *, multiple: int = 1) -> tuple[int, int]:
    """(width, height) with the shorter side reduced to `short_side` pixels, aspect kept; never enlarged.

    Both are cut down to a multiple of `multiple`, for encoders that want that.
    """
    if short_side is not None and short_side < min(width, height):
        scale = short_side / min(width, height)
        width, height = round(width * scale), round(height * scale)
    return max(multiple, width // multiple * multiple), max(multiple, height // multiple * multiple)


def one_line(error: BaseException) -> str:
    """What went wrong, without line breaks and not longer than a line."""
    # FFmpeg's errors have a plain message beside one with error number, function and path.
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split())[:200] or type(error).__name__


def _metadata_options(version: str) -> dict[str, str]:
    """Return the options of `av.open` that keep a title in another encoding than UTF-8 from being an error.

    Such titles are common in old AVI files. PyAV 19 always accepts them and has no option for it.
    """
    return {"metadata_errors": "replace"} if int(version.partition(".")[0]) < 19 else {}


def _fraction(value: Any) -> Fraction | None:
    """Convert a rational number of PyAV; None if it is not known, which PyAV says with None, or from 19 on with 0."""
    return Fraction(value.numerator, value.denominator) if value else None


# Frames that are decoded one after the other: the keyframe to begin at (None: the start of the file), those wanted.
_Run = tuple["Keyframe | None", list[int]]


class AvVideo:
    """A file read with PyAV, one thread: frame threading can hang in FFmpeg on damaged files."""

    name = "pyav"

    def __init__(self, path: str) -> None:
        try:
            import av
        except (ImportError, OSError) as error:
            raise Unsupported(path, f"PyAV is missing ({one_line(error)})") from error
        self.av = av
        self.path = path
        av.logging.set_level(av.logging.PANIC)
        self._open_file: tuple[Any, Any] | None = None
        try:
            self._use(index_cache.get(path, self._quick_index))
        except OSError as error:
            raise VideoError(path, one_line(error)) from error

    @contextmanager
    def _open(self, *, keep: bool = False, seeking: bool = False) -> Iterator[tuple[Any, Any]]:
        """The open container and its video stream. Whatever FFmpeg finds wrong becomes a VideoError.

        `keep` leaves the file open; the next call with `seeking` reuses it without rewinding.
        """
        try:
            with ExitStack() as stack:
                if seeking and self._open_file:
                    (container, stream), self._open_file = self._open_file, None
                    stack.enter_context(container)
                else:
                    container = stack.enter_context(self.av.open(self.path, **_metadata_options(self.av.__version__)))
                    stream = self._video_stream(container)
                yield container, stream
                if keep:
                    self._open_file = container, stream
                    stack.pop_all()
        except self.av.error.DecoderNotFoundError as error:
            raise Unsupported(self.path, f"PyAV has no decoder for it ({one_line(error)})") from error
        except (self.av.error.FFmpegError, OSError, UnicodeError) as error:
            raise VideoError(self.path, one_line(error)) from error

    def _video_stream(self, container: Any) -> Any:
        # The cover picture of an audio file is a video stream, too.
        streams = [s for s in container.streams.video if "attached_pic" not in str(getattr(s, "disposition", ""))]
        if not streams:
            raise VideoError(self.path, "it has no video stream")
        if streams[0].codec_context is None:
            raise Unsupported(self.path, "PyAV has no decoder for it")
        streams[0].thread_type = "NONE"
        streams[0].codec_context.thread_count = 1
        return streams[0]

    def _use(self, index: FrameIndex) -> None:
        self.index = index
        self.num_frames, self.fps, self.time_base = index.num_frames, index.fps, index.time_base

    @property
    def times(self) -> np.ndarray | None:
        return self.index.times

    def _quick_index(self) -> FrameIndex:
        # Kept open, since opening it again means probing it again.
        with self._open(keep=True) as (container, stream):
            return from_container(container, stream, **_about(stream)) or self._full_index(container, stream)

    def _full_index(self, container: Any, stream: Any) -> FrameIndex:
        """Read all packets, without decoding: what a container announces is often wrong."""
        packets = []
        codec, about = stream.codec_context.name, _about(stream)
        try:
            for packet in container.demux(stream):
                # The last packet is an empty one that flushes; discarded ones lie outside the edit list.
                if packet.size and not packet.is_discard:
                    packets.append((packet.pts, packet.is_keyframe, packet.size))
        except self.av.error.FFmpegError:
            if not packets:
                raise
        if not packets:
            raise VideoError(self.path, "it has a video stream, but no frames")
        return from_packets(packets, codec=codec, **about)

    @property
    def timed(self) -> bool:
        """Whether every frame has a timestamp of its own."""
        return len(self.index.pts) > 0

    def read(self, wanted: list[int], short_side: int | None, *, leap: bool = True) -> Found:
        """Return the frames wanted; `leap` skips what is not wanted, from keyframe to keyframe, where this saves decoding."""
        found = self._collect(self._runs(wanted), short_side) if leap else None
        if found is None and leap and not self.index.exact:
            with self._open() as (container, stream):
                self._use(index_cache.replace(self.path, self._full_index(container, stream)))
            found = self._collect(self._runs(wanted), short_side)
        if found is None:
            found = self._collect([(None, wanted)], short_side)
        assert found is not None  # counting from the start cannot lose its place
        return found

    def frames(self, short_side: int | None, *, multiple: int = 1) -> Iterator[tuple[np.ndarray, int | None]]:
        """Every frame from the first on, uint8 [H, W, 3], with its timestamp in units of `time_base` (None: it has none).

        Its sides are a multiple of `multiple`.
        """
        to_array = _Scaler(self.av, short_side, multiple)
        with self._open() as (container, stream):
            for frame in self._decode(container, stream, packet=0):
                yield to_array(frame), frame.pts

    def _runs(self, wanted: list[int]) -> list[_Run]:
        runs: list[_Run] = []
        last = -1
        for position in wanted:
            key = self.index.keyframe_before(position)
            if key is not None and key.position - last - 1 >= _WORTH_SEEKING:
                runs.append((key, [position]))
            elif runs:
                runs[-1][1].append(position)
            else:
                # The start of a file that is known by its timestamps can be sought, too.
                at_start = key is not None and key.position == key.packet == 0
                runs.append((key if at_start else None, [position]))
            last = position
        return runs

    def _collect(self, runs: list[_Run], short_side: int | None) -> Found | None:
        """Decode each run from its keyframe (None: from where the file begins) up to the last frame wanted of it.

        After a seek a frame is known by its timestamp; None if the timestamps do not lead from frame to frame, if they are
        not as an index that is not exact assumes, or if the file cannot be sought in.
        """
        to_array = _Scaler(self.av, short_side)
        frames: dict[int, np.ndarray] = {}
        with self._open(seeking=runs[0][0] is not None) as (container, stream):
            for key, wanted in runs:
                if key is not None:
                    try:
                        container.seek(key.timestamp, stream=stream)
                    except self.av.error.FFmpegError:
                        return None
                position, frame = -1, None
                seen: list[int | None] = []
                for frame in self._decode(container, stream, packet=key.packet if key else 0, seen=seen):
                    if key is None:
                        position += 1
                    else:
                        here = self.index.position(frame.pts)
                        start = key.position if self.index.exact else self.index.position(seen[0])
                        # Frames shown before the keyframe may have holes; from there on each must follow the other.
                        if here is None or start is None or start > wanted[0] or not position < here <= max(position + 1, start):
                            return None
                        position = here
                    if position in wanted:
                        frames[position] = to_array(frame)
                        if position == wanted[-1]:
                            if key and not self._confirmed(key, seen):
                                return None
                            break
                else:
                    if frame is None or (key and not self._confirmed(key, seen)):
                        return None if key else ({}, 0)
                    if position not in frames:
                        frames[position] = to_array(frame)
                    return frames, position + 1
        return frames, None

    def _confirmed(self, key: Keyframe, seen: list[int | None]) -> bool:
        """Whether the pts of the packets read after a seek are as the index has them."""
        if self.index.exact:
            return True
        # The keyframe is shown after all packets before it in the file, and after those behind it with an earlier pts.
        return None not in seen and self.index.position(seen[0]) == key.packet + sum(pts < seen[0] for pts in seen)

    def _decode(self, container: Any, stream: Any, *, packet: int, seen: list[int | None] | None = None) -> Iterator[Any]:
        """Decode from packet number `packet` on, where the container stands; `seen` gets the pts of the packets."""
        try:
            for data in container.demux(stream):
                if seen is not None and data.size:
                    seen.append(data.pts)
                yield from data.decode()
                packet += 1
        except self.av.error.FFmpegError as error:
            if packet < (1 - _TAIL_SHARE) * self.num_frames:
                reason = f"packet {packet + 1} of {self.num_frames} cannot be decoded ({one_line(error)})"
                raise VideoError(self.path, reason) from error


def _about(stream: Any) -> dict[str, Fraction | None]:
    """Return what a stream's header says of time, as a FrameIndex has it."""
    return {"time_base": _fraction(stream.time_base), "header_rate": _fraction(stream.average_rate)}


class _Scaler:
    """Turns decoded frames into upright RGB arrays of one size.

    One scaler for a whole read: `frame.reformat` sets up a new one, with threads, for every frame, and that costs as
    much as decoding small videos does.
    """

    def __init__(self, av: Any, short_side: int | None, multiple: int = 1) -> None:
        self._short_side = short_side
        self._multiple = multiple
        self._size: tuple[int, int] | None = None  # the first frame's; a stream may change its own on the way
        self._reformat = av.video.reformatter.VideoReformatter().reformat
        self._threads = {"threads": 1}

    def __call__(self, frame: Any) -> np.ndarray:
        """uint8 [H, W, 3]."""
        self._size = self._size or scaled_size(frame.width, frame.height, self._short_side, multiple=self._multiple)
        width, height = self._size
        try:
            scaled = self._reformat(frame, width=width, height=height, format="rgb24", **self._threads)
        except TypeError:  # PyAV before 17 has no such argument, and one thread only
            self._threads = {}
            scaled = self._reformat(frame, width=width, height=height, format="rgb24")
        # Degrees counter-clockwise, from the container's display matrix: phones store portrait videos lying down.
        turns = round(getattr(frame, "rotation", 0) / 90) % 4
        array = scaled.to_ndarray()
        return np.rot90(array, turns) if turns else array


class DecordVideo:
    """A file read with decord, strictly frame after frame: its random access is neither exact nor safe."""

    name = "decord"
    index = None

    def __init__(self, path: str) -> None:
        try:
            import decord
        except (ImportError, OSError) as error:
            raise Unsupported(path, f"decord is missing ({one_line(error)})") from error
        decord.logging.set_level(decord.logging.QUIET)  # what is wrong is in the exception
        self.path = path
        self.errors = (RuntimeError, decord.DECORDError)
        if _is_transport_stream(path):
            # Its first frame is the second keyframe there, and all others are counted from that.
            raise VideoError(path, "decord does not read transport streams from their start")
        try:
            # Opened here and not before: a reader that lives through a fork hangs in the worker.
            self.reader = decord.VideoReader(path, num_threads=1)
            self.num_frames = len(self.reader)
            self.fps = possible_rate(self.reader.get_avg_fps())
        except self.errors as error:
            raise VideoError(path, f"decord: {one_line(error)}") from error
        if self.num_frames == 0:
            raise VideoError(path, "it has a video stream, but no frames")

    @property
    def times(self) -> np.ndarray | None:
        try:
            times = self.reader.get_frame_timestamp(range(self.num_frames))[:, 0].astype(np.float64)
        except self.errors:
            return None
        # Where the container has no timestamps they are arbitrary numbers.
        return uneven(times - times[0]) if np.abs(times).max() < _LONGEST else None

    def read(self, wanted: list[int], short_side: int | None, *, leap: bool = True) -> Found:
        frames: dict[int, np.ndarray] = {}
        position, frame = -1, None
        try:
            self.reader.seek(0)
            while position < wanted[-1]:
                frame = self.reader.next()
                position += 1
                if position in wanted:
                    frames[position] = self._scaled(frame, short_side)
        except StopIteration:
            if frame is not None:
                frames[position] = self._scaled(frame, short_side)
            return frames, position + 1
        except self.errors as error:
            raise VideoError(self.path, f"decord: {one_line(error)}") from error
        return frames, None

    def _scaled(self, frame: Any, short_side: int | None) -> np.ndarray:
        # decord could decode at the target size, but fails on some sizes ("the size must exactly match").
        array = frame.asnumpy()
        return resized(array[None], scaled_size(array.shape[1], array.shape[0], short_side))[0]


def _is_transport_stream(path: str) -> bool:
    """Whether a file is an MPEG transport stream: packets of 188 bytes, or 192 on Blu-ray discs, that begin with 0x47."""
    try:
        with open(path, "rb") as file:
            start = file.read(3 * 192)
    except OSError:
        return False
    return any(start[first::size][:3] == b"GGG" for first, size in ((0, 188), (4, 192)))


def resized(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [T, H, W, 3] at another (width, height), antialiased, by torchvision, which is quicker than Pillow (`benchmarks/loader_speed.py`)."""
    import torch
    from torchvision.transforms.v2 import functional as F

    width, height = size
    if (height, width) == frames.shape[1:3]:
        return frames
    images = F.resize(torch.from_numpy(frames).permute(0, 3, 1, 2), [height, width], antialias=True)
    return images.permute(0, 2, 3, 1).numpy()
