"""Encode H.264 files that are fast to train from: small, with many keyframes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from atfr.data.types import VideoError
from atfr.data.video.av_reader import AvVideo
from atfr.utils.atomic_io import atomic_write

Add = Callable[..., None]

_CRF = 20  # nearly lossless to the eye
_RATE = 25  # frames per second of files of unknown rate


@contextmanager
def h264_file(path: Path, *, rate: Fraction | int, keyframe: int, time_base: Fraction | None = None) -> Iterator[Add]:
    """Yield a function `add(frame, pts=None)` that writes RGB frames, uint8 [H, W, 3] with even sides, to an mp4 file.

    There is a keyframe at least every `keyframe` frames. Without `time_base` (seconds), frames have the constant `rate`;
    with it, each frame needs a `pts` in units of it. The file is written atomically.
    """
    # bitexact: without the encoder's version string, so that the bytes depend only on the frames.
    with atomic_write(path) as temporary, av.open(str(temporary), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.pix_fmt = "yuv420p"
        stream.gop_size = keyframe
        if time_base is not None:
            stream.codec_context.time_base = time_base
        # One thread: videos are encoded in parallel, and the bytes must not depend on the number of cores.
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


def encode(source: str, target: Path, *, short_side: int, keyframe: int, heartbeat: Callable[[], None] = lambda: None) -> None:
    """Write a copy of a video to `target`: H.264 in mp4 format, whatever the suffix.

    The copy has the same frames at the same times from the first, upright and with even sides, and no sound. The shorter
    side is reduced to `short_side` pixels, never enlarged. There is a keyframe at least every `keyframe` frames. Without
    usable timestamps (`AvVideo.timed`), frames have the file's mean rate. The copy gets the modification time of the
    original, by which `is_copied` recognises it. `heartbeat` is called after each frame.

    Raises:
        VideoError: the video cannot be read, or `target` is the original.
    """
    if os.path.isdir(source):
        raise VideoError(source, "a folder of frames is not re-encoded")
    if target.exists() and os.path.samefile(source, target):
        raise VideoError(source, f"its copy {target} would be the file itself")
    video = AvVideo(source)
    changed = os.stat(source)
    rate = Fraction(video.fps or _RATE).limit_denominator(1001)
    number = last = -1
    first: int | None = None
    with h264_file(target, rate=rate, keyframe=keyframe, time_base=video.time_base if video.timed else None) as add:
        for number, (pixels, pts) in enumerate(video.frames(short_side, multiple=2)):
            first = pts if number == 0 else first
            if video.timed:
                last = last + 1 if pts is None or first is None else max(pts - first, last + 1)  # timestamps must increase
            add(pixels, last if video.timed else None)
            heartbeat()
        if number < 0:
            raise VideoError(source, f"none of its {video.num_frames} frames can be decoded")
    os.utime(target, ns=(changed.st_atime_ns, changed.st_mtime_ns))


def is_copied(source: str, target: Path) -> bool:
    """Return whether `encode` has copied `source` to `target`, and it has not changed since."""
    if target.is_symlink():
        return False
    try:
        # Some file systems store times in units of two seconds.
        return abs(os.stat(source).st_mtime_ns - os.stat(target).st_mtime_ns) <= 2e9
    except OSError:
        return False
