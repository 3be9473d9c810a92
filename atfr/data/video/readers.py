"""The interface of video readers, and functions that they share."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from atfr.data.types import VideoError
from atfr.data.video.frame_index import FrameIndex

# Result of a read: the frames by index, and None; or, if the video ended early, the frames with its last one, and the
# true number of frames.
ReadResult = tuple[dict[int, np.ndarray], "int | None"]


class Reader(Protocol):
    """An open video. Its constructor takes the path. Do not use a reader after a fork: its file may be open."""

    name: str  # of the library
    path: str
    num_frames: int  # expected
    fps: float | None  # mean rate; None: unknown

    @property
    def index(self) -> FrameIndex | None:
        """The origin of `num_frames`, `fps` and `times`; a read that finds it wrong replaces it."""

    @property
    def times(self) -> np.ndarray | None:
        """Seconds of each frame from the first; None at a constant or unknown rate."""

    def read(self, wanted: list[int], short_side: int | None, *, seek: bool = True) -> ReadResult:
        """Read the frames with the indices `wanted` (sorted, in display order)."""


class Unsupported(VideoError):
    """The library cannot read the video; another library may."""


def scaled_size(width: int, height: int, short_side: int | None, *, multiple: int = 1) -> tuple[int, int]:
    """Return (width, height) with the shorter side reduced to `short_side` pixels; never enlarged, same aspect ratio.

    Both are rounded down to a multiple of `multiple`, as encoders need.
    """
    if short_side is not None and short_side < min(width, height):
        scale = short_side / min(width, height)
        width, height = round(width * scale), round(height * scale)
    return max(multiple, width // multiple * multiple), max(multiple, height // multiple * multiple)


def one_line(error: BaseException) -> str:
    """Format an error as one line."""
    # strerror of FFmpeg's errors is the plain message; str() adds error number, function and path.
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split())[:200] or type(error).__name__


def resized(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize uint8 [T, H, W, 3] to (width, height) with antialiasing.

    torchvision is faster than Pillow (`benchmarks/loader_speed.py`).
    """
    import torch
    from torchvision.transforms.v2 import functional as F

    width, height = size
    if (height, width) == frames.shape[1:3]:
        return frames
    images = F.resize(torch.from_numpy(frames).permute(0, 3, 1, 2), [height, width], antialias=True)
    return images.permute(0, 2, 3, 1).numpy()
