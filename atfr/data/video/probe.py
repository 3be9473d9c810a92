"""What a video is, and whether it can be read."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

import numpy as np

from atfr.data.types import VideoError
from atfr.data.video.decode import read_clip

_MIB = 1 << 20


@dataclass(frozen=True)
class FileState:
    """What tells that a file has changed: its size in bytes, and the time of its last change in nanoseconds."""

    bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Probe:
    """A video as it was found; the facts are None, and `reason` says why, where it cannot be read."""

    state: FileState | None  # None: there is no such file, or no getting at it
    frames: int | None = None  # that decode
    fps: float | None = None  # mean rate, None also where it is not known
    width: int | None = None  # pixels, upright
    height: int | None = None
    quick_hash: str = ""
    reason: str = ""

    @property
    def good(self) -> bool:
        return self.frames is not None


def file_state(path: str) -> FileState | None:
    """The state of a file, or of a folder of frames, whose size is that of its files."""
    try:
        found = os.stat(path)
        size = sum(entry.stat().st_size for entry in os.scandir(path)) if os.path.isdir(path) else found.st_size
    except OSError:
        return None
    return FileState(size, found.st_mtime_ns)


def probe(path: str, *, decoder: str = "pyav") -> Probe:
    """Read the first, the middle and the last frame of a video as training would, with `decoder` first.

    All that lies between them is decoded, too, so that damage anywhere is met.
    """
    state = file_state(path)
    announced = 0

    def pick(num_frames: int, fps: float | None) -> np.ndarray:
        nonlocal announced
        announced = announced or num_frames
        return np.array([0, num_frames // 2, num_frames - 1])

    try:
        decoded = read_clip(path, pick, decoder=decoder, leap=False)
        key = quick_hash(path)
    except VideoError as error:
        return Probe(state, reason=error.reason)
    height, width = decoded.frames.shape[1:3]
    # Each file has packets without a frame in some containers; a large share is a file that was cut off.
    short = announced - decoded.num_frames
    reason = f"only {decoded.num_frames} of {announced} frames can be decoded" if short > max(4, announced // 20) else ""
    return Probe(state, decoded.num_frames, decoded.fps, width, height, key, reason)


def quick_hash(path: str) -> str:
    """32 hexadecimal digits (BLAKE2b) of a file's size and its first and last MiB; of a folder, of its names and sizes."""
    digest = hashlib.blake2b(digest_size=16)
    if os.path.isdir(path):
        for name, size in sorted((os.fsencode(entry.name), entry.stat().st_size) for entry in os.scandir(path)):
            digest.update(b"%b\0%d\0" % (name, size))
        return digest.hexdigest()
    size = os.path.getsize(path)
    digest.update(b"%d\0" % size)
    with open(path, "rb") as file:
        digest.update(file.read(_MIB))
        file.seek(max(0, size - _MIB))
        digest.update(file.read(_MIB))
    return digest.hexdigest()
