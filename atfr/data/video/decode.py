"""Read the frames of one clip from a video file or a folder of frames.

Two libraries can read; each is the other's fallback. PyAV goes first unless told otherwise: `benchmarks/decoders.py`
measured it as quicker than decord on all sets of real files that were tried (`benchmarks/results/decoders-cpu.txt`), and
decord's random access returns other frames than were asked for in MPEG-4 with packed B-frames (UT-Interaction, HMDB51);
it is read frame after frame here. decord can also spin for ever in native code, out of reach
of Python's signals (github.com/dmlc/decord/issues/373): datasets read under a `TimeLimit`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from atfr.data.types import VideoError
from atfr.data.video.frame_folder import FrameFolder
from atfr.data.video.readers import AvVideo, DecordVideo, Unsupported

Pick = Callable[[int, "float | None"], np.ndarray]
PickByTime = Callable[[np.ndarray], np.ndarray]
DECODERS = ("pyav", "decord")

# A container may promise frames that do not decode. Up to this many (or this share of the video) are made up for by
# the last frame that does; beyond that the clip is chosen again from what there is.
_SPARE_FRAMES = 4
_SPARE_SHARE = 0.05


class Decoded(NamedTuple):
    """Frames, what read them ("pyav", "decord", or "frames" for a folder of images), and what it says of the video."""

    frames: np.ndarray  # uint8 [T, H, W, 3] in RGB, upright
    decoder: str
    num_frames: int  # of the whole video: those that decode, if the last one was asked for, or else the packets
    fps: float | None  # its mean rate, None where it is not known


def read_clip(
    path: str,
    pick: Pick,
    *,
    pick_by_time: PickByTime | None = None,
    short_side: int | None = None,
    decoder: str = "pyav",
    leap: bool = True,
) -> Decoded:
    """Return the frames that `pick` chooses of a video file, or of a folder of images.

    `pick(num_frames, fps)` returns frame indices [T] in [0, num_frames); they need not be sorted and may repeat. It
    must depend on these two alone, since it can be asked twice: `num_frames` is at first the number of video packets,
    and a file may decode to fewer frames than that. The rule: when at most 4 frames or 5 % are missing at the end,
    the last frame that decodes stands in for them; when more are, `pick` is asked again with the true number. A
    frame's index is its position in display order. `fps` is the file's mean rate, None where it is not known.

    Where the rate varies, `pick_by_time(times)` is asked instead if it is given. `times`, float64 [num_frames], are the
    seconds of the frames from the first one on. The rate varies if counting frames at the mean rate misses the time of one
    by a frame or more.

    With `short_side` (pixels) frames are scaled while decoding so that their shorter side has that length, aspect
    kept; a smaller video is not enlarged. `decoder` names the library that goes first: "pyav", with decord where PyAV
    or its decoder is missing; or "decord", with PyAV for every file that decord cannot read. Without `leap` everything up
    to the last frame picked is decoded, so that damage anywhere is met.

    Raises VideoError for a file that is missing, empty, no video, or whose frames cannot be decoded (a decoder's
    error in the last 10 % of the file merely ends the video), and for a folder that `FrameFolder` does not read.
    """
    if decoder not in DECODERS:
        raise ValueError(f"decoder is {decoder!r}, it must be one of {', '.join(DECODERS)}")
    picks = pick, pick_by_time
    if os.path.isdir(path):
        return _read(FrameFolder, path, picks, short_side, leap)
    _check_file(path)
    first, second = (AvVideo, DecordVideo) if decoder == "pyav" else (DecordVideo, AvVideo)
    # PyAV tells a library's failure from a file's; decord does not, so what it cannot read is always tried again.
    lacking = Unsupported if first is AvVideo else VideoError
    try:
        return _read(first, path, picks, short_side, leap)
    except lacking as error:
        try:
            return _read(second, path, picks, short_side, leap)
        except Unsupported:
            raise VideoError(path, error.reason) from error


def _check_file(path: str) -> None:
    try:
        size = os.path.getsize(path)
    except OSError as error:
        raise VideoError(path, error.strerror or str(error)) from error
    if size == 0:
        raise VideoError(path, "the file is empty (0 bytes)")


def _read(
    open_video: type[AvVideo] | type[DecordVideo] | type[FrameFolder],
    path: str,
    picks: tuple[Pick, PickByTime | None],
    short_side: int | None,
    leap: bool,
) -> Decoded:
    video = open_video(path)
    index = video.index
    clip = _pick_and_read(video, picks, short_side, leap)
    if video.index is not index:  # the read found the index wrong that the frames were picked by
        clip = _pick_and_read(video, picks, short_side, leap)
    return clip


def _pick_and_read(
    video: AvVideo | DecordVideo | FrameFolder, picks: tuple[Pick, PickByTime | None], short_side: int | None, leap: bool
) -> Decoded:
    pick, pick_by_time = picks
    times = video.times if pick_by_time else None
    num_frames = video.num_frames
    for attempt in (1, 2):
        picked = pick(num_frames, video.fps) if pick_by_time is None or times is None else pick_by_time(times[:num_frames])
        wanted = np.asarray(picked, dtype=np.int64)
        if wanted.size == 0 or wanted.min() < 0 or wanted.max() >= num_frames:
            raise ValueError(f"pick({num_frames}) returned {wanted.tolist()}, it must stay in [0, {num_frames})")
        frames, end = video.read(sorted(set(wanted.tolist())), short_side, leap=leap)
        if end is None:
            return Decoded(np.stack([frames[index] for index in wanted.tolist()]), video.name, num_frames, video.fps)
        if end == 0:
            raise VideoError(video.path, f"none of its {video.num_frames} frames can be decoded")
        if attempt == 2 or num_frames - end <= max(_SPARE_FRAMES, _SPARE_SHARE * num_frames):
            break
        num_frames = end
    return Decoded(np.stack([frames[min(index, end - 1)] for index in wanted.tolist()]), video.name, end, video.fps)
