"""Read videos with PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from typing import Any

import numpy as np

from atfr.data.types import VideoError
from atfr.data.video.frame_index import FrameIndex, Keyframe, index_cache, index_from_packets, index_from_table
from atfr.data.video.readers import ReadResult, Unsupported, one_line, scaled_size

_TAIL = 0.1  # a decoding error in this last part of the file ends the video; before that, the video is bad
_WORTH_SEEKING = 4  # frames that a seek must save; it costs about as much as decoding one or two

# Frames that are decoded in one pass: the keyframe to start from (None: the start of the file), and the wanted frames.
_Run = tuple["Keyframe | None", list[int]]


class AvVideo:
    """A file that is read with PyAV in one thread: FFmpeg's frame threading can hang on damaged files."""

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
        """Open the container and its video stream; errors of FFmpeg become VideoError.

        `keep` leaves the file open, for the next call with `seeking`, which does not rewind it.
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
        # The cover picture of an audio file is also a video stream.
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
        # Keep it open: opening it again would probe it again.
        with self._open(keep=True) as (container, stream):
            return index_from_table(container, stream, **_stream_times(stream)) or self._full_index(container, stream)

    def _full_index(self, container: Any, stream: Any) -> FrameIndex:
        """Read all packets without decoding them, since headers are often wrong."""
        packets = []
        codec, about = stream.codec_context.name, _stream_times(stream)
        try:
            for packet in container.demux(stream):
                # The last packet is empty and flushes the decoder; discarded packets are outside the edit list.
                if packet.size and not packet.is_discard:
                    packets.append((packet.pts, packet.is_keyframe, packet.size))
        except self.av.error.FFmpegError:
            if not packets:
                raise
        if not packets:
            raise VideoError(self.path, "it has a video stream, but no frames")
        return index_from_packets(packets, codec=codec, **about)

    @property
    def timed(self) -> bool:
        """Whether each frame has its own timestamp."""
        return len(self.index.pts) > 0

    def read(self, wanted: list[int], short_side: int | None, *, seek: bool = True) -> ReadResult:
        """Read frames; `seek` skips unwanted ones from keyframe to keyframe, if this saves decoding."""
        found = self._collect(self._runs(wanted), short_side) if seek else None
        if found is None and seek and not self.index.exact:
            with self._open() as (container, stream):
                self._use(index_cache.replace(self.path, self._full_index(container, stream)))
            found = self._collect(self._runs(wanted), short_side)
        if found is None:
            found = self._collect([(None, wanted)], short_side)
        assert found is not None  # counting frames from the start always succeeds
        return found

    def frames(self, short_side: int | None, *, multiple: int = 1) -> Iterator[tuple[np.ndarray, int | None]]:
        """Yield every frame, uint8 [H, W, 3], with its timestamp in units of `time_base`, or None.

        Height and width are multiples of `multiple`.
        """
        to_array = _Scaler(self.av, short_side, multiple)
        with self._open() as (container, stream):
            for frame in self._decode(container, stream, packet=0):
                yield to_array(frame), frame.pts

    def _runs(self, wanted: list[int]) -> list[_Run]:
        """Split the wanted frames into runs, with a seek before each that saves enough decoding."""
        runs: list[_Run] = []
        last = -1
        for position in wanted:
            key = self.index.keyframe_before(position)
            if key is not None and key.position - last - 1 >= _WORTH_SEEKING:
                runs.append((key, [position]))
            elif runs:
                runs[-1][1].append(position)
            else:
                # With timestamps, the start of the file is also reached by a seek, which does not reopen it.
                at_start = key is not None and key.position == key.packet == 0
                runs.append((key if at_start else None, [position]))
            last = position
        return runs

    def _collect(self, runs: list[_Run], short_side: int | None) -> ReadResult | None:
        """Decode each run from its keyframe (None: the start of the file) to its last wanted frame.

        After a seek, frames are identified by their timestamps. Return None if these have gaps or disagree with an index
        that is not exact, or if the file is not seekable.
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
                        # Frames before the keyframe in display order may have gaps; later ones must not.
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
        """Return whether the index has the right pts for the packets that were read after a seek."""
        if self.index.exact:
            return True
        # The keyframe is displayed after all packets before it in the file, and after later packets with an earlier pts.
        known = [pts for pts in seen if pts is not None]
        return len(known) == len(seen) and self.index.position(known[0]) == key.packet + sum(pts < known[0] for pts in known)

    def _decode(self, container: Any, stream: Any, *, packet: int, seen: list[int | None] | None = None) -> Iterator[Any]:
        """Decode from the container's position, which is packet number `packet`; append the pts of the packets to `seen`."""
        try:
            for data in container.demux(stream):
                if seen is not None and data.size:
                    seen.append(data.pts)
                yield from data.decode()
                packet += 1
        except self.av.error.FFmpegError as error:
            if packet < (1 - _TAIL) * self.num_frames:
                reason = f"packet {packet + 1} of {self.num_frames} cannot be decoded ({one_line(error)})"
                raise VideoError(self.path, reason) from error


def _metadata_options(version: str) -> dict[str, str]:
    """Return the options of `av.open` that accept titles that are not UTF-8, as in old AVI files.

    PyAV 19 always accepts them and has no such option.
    """
    return {"metadata_errors": "replace"} if int(version.partition(".")[0]) < 19 else {}


def _fraction(value: Any) -> Fraction | None:
    """Convert a rational number of PyAV. An unknown one, None or (from PyAV 19) 0, becomes None."""
    return Fraction(value.numerator, value.denominator) if value else None


def _stream_times(stream: Any) -> dict[str, Fraction | None]:
    """Return time base and rate from a stream's header, as arguments of FrameIndex."""
    return {"time_base": _fraction(stream.time_base), "header_rate": _fraction(stream.average_rate)}


class _Scaler:
    """Convert decoded frames to upright RGB arrays of one size.

    Used for a whole read: `frame.reformat` sets up a new scaler with threads for each frame, which takes as long as
    decoding a small video.
    """

    def __init__(self, av: Any, short_side: int | None, multiple: int = 1) -> None:
        self._short_side = short_side
        self._multiple = multiple
        self._size: tuple[int, int] | None = None  # of the first frame; the size of a stream may change
        self._reformat = av.video.reformatter.VideoReformatter().reformat
        self._threads = {"threads": 1}

    def __call__(self, frame: Any) -> np.ndarray:
        """Convert a frame to uint8 [H, W, 3]."""
        self._size = self._size or scaled_size(frame.width, frame.height, self._short_side, multiple=self._multiple)
        width, height = self._size
        try:
            scaled = self._reformat(frame, width=width, height=height, format="rgb24", **self._threads)
        except TypeError:  # PyAV before 17 has no such argument and uses one thread
            self._threads = {}
            scaled = self._reformat(frame, width=width, height=height, format="rgb24")
        # Degrees counter-clockwise, from the display matrix: phones store portrait videos as rotated landscape videos.
        turns = round(getattr(frame, "rotation", 0) / 90) % 4
        array = scaled.to_ndarray()
        return np.rot90(array, turns) if turns else array
