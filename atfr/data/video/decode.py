"""Read the frames of a clip from a video file or a folder of frames.

Two libraries can decode; each is the fallback of the other. PyAV is the default: it was faster than decord on all sets of
real files (`benchmarks/decoders.py`, `benchmarks/results/decoders-cpu.txt`). decord's random access returns wrong frames
for MPEG-4 with packed B-frames (UT-Interaction, HMDB51), so it is read in order here. It can also hang in native code that
Python signals cannot interrupt (github.com/dmlc/decord/issues/373), so datasets read under a `TimeLimit`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from atfr.data.types import VideoError
from atfr.data.video.av_reader import AvVideo
from atfr.data.video.decord_reader import DecordVideo
from atfr.data.video.frame_folder import FrameFolder
from atfr.data.video.readers import Reader, Unsupported

Pick = Callable[[int, "float | None"], np.ndarray]
PickByTime = Callable[[np.ndarray], np.ndarray]
DECODERS = ("pyav", "decord")

# A container may announce frames that do not decode. If at most this many (or this part of the video) are missing at the
# end, the last frame is repeated. If more are missing, the clip is chosen again.
_MISSING_FRAMES = 4
_MISSING_PART = 0.05


class Decoded(NamedTuple):
    """Decoded frames and facts about their video."""

    frames: np.ndarray  # uint8 [T, H, W, 3] in RGB, upright
    decoder: str  # "pyav", "decord", or "frames" for a folder of images
    num_frames: int  # of the whole video: decodable frames if the last one was read, or else packets
    fps: float | None  # mean rate; None: unknown


def read_clip(
    path: str,
    pick: Pick,
    *,
    pick_by_time: PickByTime | None = None,
    short_side: int | None = None,
    decoder: str = "pyav",
    seek: bool = True,
) -> Decoded:
    """Read the frames that `pick` chooses from a video file or a folder of images.

    Args:
        pick: `pick(num_frames, fps)` returns frame indices [T] in [0, num_frames), in display order; they may be unsorted
            and repeat. `num_frames` is at first the number of packets. A file may decode to fewer frames: if at most 4
            frames or 5 % are missing at the end, the last frame is repeated; if more are missing, `pick` is called again
            with the true number. `fps` is the mean rate, or None if unknown. The result must depend only on these two.
        pick_by_time: `pick_by_time(times)` is called instead if the rate is variable (`times_if_variable`). `times`,
            float64 [num_frames], are the seconds of the frames from the first.
        short_side: length in pixels of the frames' shorter side; smaller videos are not enlarged. None: not scaled.
        decoder: the library that is tried first. "pyav" falls back to decord if PyAV or its decoder is missing; "decord"
            falls back to PyAV if decord cannot read the file.
        seek: False decodes everything up to the last frame, to detect damage anywhere.

    Raises:
        VideoError: the file is missing, empty, not a video or damaged (an error in the last 10 % of the file only ends the
            video), or a folder that `FrameFolder` cannot read.
    """
    if decoder not in DECODERS:
        raise ValueError(f"decoder is {decoder!r}, it must be one of {', '.join(DECODERS)}")
    picks = pick, pick_by_time
    if os.path.isdir(path):
        return _read(FrameFolder, path, picks, short_side, seek)
    _check_file(path)
    first, second = (AvVideo, DecordVideo) if decoder == "pyav" else (DecordVideo, AvVideo)
    # PyAV distinguishes failures of the library and of the file; decord does not, so PyAV always tries again.
    retried = Unsupported if first is AvVideo else VideoError
    try:
        return _read(first, path, picks, short_side, seek)
    except retried as error:
        try:
            return _read(second, path, picks, short_side, seek)
        except Unsupported:
            raise VideoError(path, error.reason) from error


def _check_file(path: str) -> None:
    try:
        size = os.path.getsize(path)
    except OSError as error:
        raise VideoError(path, error.strerror or str(error)) from error
    if size == 0:
        raise VideoError(path, "the file is empty (0 bytes)")


def _read(open_video: Callable[[str], Reader], path: str, picks: tuple[Pick, PickByTime | None], short_side: int | None, seek: bool) -> Decoded:
    video = open_video(path)
    index = video.index
    clip = _pick_and_read(video, picks, short_side, seek)
    if video.index is not index:  # the frames were picked by a wrong index
        clip = _pick_and_read(video, picks, short_side, seek)
    return clip


def _pick_and_read(video: Reader, picks: tuple[Pick, PickByTime | None], short_side: int | None, seek: bool) -> Decoded:
    pick, pick_by_time = picks
    times = video.times if pick_by_time else None
    num_frames, again = video.num_frames, True
    while True:
        picked = pick(num_frames, video.fps) if pick_by_time is None or times is None else pick_by_time(times[:num_frames])
        wanted = np.asarray(picked, dtype=np.int64)
        if wanted.size == 0 or wanted.min() < 0 or wanted.max() >= num_frames:
            raise ValueError(f"pick({num_frames}) returned {wanted.tolist()}, indices must be in [0, {num_frames})")
        frames, end = video.read(sorted(set(wanted.tolist())), short_side, seek=seek)
        if end is None:
            return Decoded(np.stack([frames[index] for index in wanted.tolist()]), video.name, num_frames, video.fps)
        if end == 0:
            raise VideoError(video.path, f"none of its {video.num_frames} frames can be decoded")
        if not again or num_frames - end <= max(_MISSING_FRAMES, _MISSING_PART * num_frames):
            return Decoded(np.stack([frames[min(index, end - 1)] for index in wanted.tolist()]), video.name, end, video.fps)
        num_frames, again = end, False
