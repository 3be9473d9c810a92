"""Read videos with decord."""

from __future__ import annotations

from typing import Any

import numpy as np

from atfr.data.types import VideoError
from atfr.data.video.frame_index import times_if_variable, valid_rate
from atfr.data.video.readers import ReadResult, Unsupported, one_line, resized, scaled_size

_LONGEST = 1e7  # seconds; later timestamps are invalid


class DecordVideo:
    """A file that is read with decord, strictly in order: its random access is neither exact nor safe."""

    name = "decord"
    index = None

    def __init__(self, path: str) -> None:
        try:
            import decord
        except (ImportError, OSError) as error:
            raise Unsupported(path, f"decord is missing ({one_line(error)})") from error
        decord.logging.set_level(decord.logging.QUIET)  # exceptions have the message
        self.path = path
        self.errors = (RuntimeError, decord.DECORDError)
        if _is_transport_stream(path):
            # decord counts their frames from the second keyframe.
            raise VideoError(path, "decord does not read transport streams from their start")
        try:
            self.reader = decord.VideoReader(path, num_threads=1)
            self.num_frames = len(self.reader)
            self.fps = valid_rate(self.reader.get_avg_fps())
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
        # Arbitrary numbers if the container has no timestamps.
        return times_if_variable(times - times[0]) if np.abs(times).max() < _LONGEST else None

    def read(self, wanted: list[int], short_side: int | None, *, seek: bool = True) -> ReadResult:
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
        # decord can decode at the target size, but fails for some sizes ("the size must exactly match").
        array = frame.asnumpy()
        return resized(array[None], scaled_size(array.shape[1], array.shape[0], short_side))[0]


def _is_transport_stream(path: str) -> bool:
    """Return whether a file is an MPEG transport stream: packets of 188 bytes (192 on Blu-ray) that begin with 0x47."""
    try:
        with open(path, "rb") as file:
            start = file.read(3 * 192)
    except OSError:
        return False
    return any(start[first::size][:3] == b"GGG" for first, size in ((0, 188), (4, 192)))
