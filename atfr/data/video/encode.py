"""H.264 files that are quick to train from: small, and with a keyframe never far."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from atfr.data.types import VideoError
from atfr.data.video.readers import AvVideo
from atfr.utils.atomic_io import written_whole

Add = Callable[..., None]

_CRF = 20  # what is lost is hard to see
_RATE = 25  # frames a second, where a file does not say


@contextmanager
def h264_file(path: Path, *, rate: Fraction | int, keyframe: int, time_base: Fraction | None = None) -> Iterator[Add]:
    """A function `add(frame, pts=None)` for RGB frames, uint8 [H, W, 3] with even sides, that writes an mp4 file.

    There is a keyframe at least every `keyframe` frames. Without `time_base` (seconds) frames come `rate` a second;
    with it each needs a `pts`, its time as a multiple of that. The file appears only when it is complete.
    """
    # bitexact leaves out the encoder's version string, the only thing that is not the pictures' doing
    with written_whole(path) as temporary, av.open(str(temporary), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.pix_fmt = "yuv420p"
        stream.gop_size = keyframe
        if time_base is not None:
            stream.codec_context.time_base = time_base
        # One thread: the others encode other videos, and the bytes do not depend on the machine's cores.
        stream.options = {"crf": str(_CRF), "preset": "veryfast", "bf": "0", "threads": "1", "flags": "+bitexact"}

        def add(pixels: np.ndarray, pts: int | None = None) -> None:
            if not stream.codec_context.is_open:
                stream.height, stream.width = pixels.shape[:2]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts, time_base
            container.mux(stream.encode(frame))

        yield add
        container.mux(stream.encode())


def encode(source: str, target: Path, *, short_side: int, keyframe: int, alive: Callable[[], None] = lambda: None) -> None:
    """Write a copy of a video to `target`, as H.264 in an mp4 file whatever the name is.

    It has the same frames at the same times (counted from the first), upright, with the shorter side reduced to
    `short_side` pixels but never enlarged, even sides, no sound, and a keyframe at least every `keyframe` frames. Where
    the file's timestamps make no sense (`AvVideo.timed`) frames come at its rate. The copy takes over the time of change
    of the original, so that `is_copied` knows it. `alive` is called after each frame.

    Raises VideoError for what cannot be read, and when `target` is the original itself.
    """
    if os.path.isdir(source):
        raise VideoError(source, "a folder of frames is not re-encoded")
    if target.exists() and os.path.samefile(source, target):
        raise VideoError(source, f"its copy {target} would be the file itself")
    video = AvVideo(source)
    changed = os.stat(source)
    rate = Fraction(video.fps or _RATE).limit_denominator(1001)
    number = first = last = -1
    with h264_file(target, rate=rate, keyframe=keyframe, time_base=video.time_base if video.timed else None) as add:
        for number, (pixels, pts) in enumerate(video.frames(short_side, multiple=2)):
            first = pts if number == 0 else first
            if video.timed:
                last = max(pts - first, last + 1)  # an encoder refuses time that stands still
            add(pixels, last if video.timed else None)
            alive()
        if number < 0:
            raise VideoError(source, f"none of its {video.num_frames} frames can be decoded")
    os.utime(target, ns=(changed.st_atime_ns, changed.st_mtime_ns))


def is_copied(source: str, target: Path) -> bool:
    """Whether `encode` has copied `source`, as it is now, to `target`."""
    if target.is_symlink():
        return False
    try:
        # Some file systems keep times to two seconds only.
        return abs(os.stat(source).st_mtime_ns - os.stat(target).st_mtime_ns) <= 2e9
    except OSError:
        return False
