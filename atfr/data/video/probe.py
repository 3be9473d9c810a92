"""Probe videos: find out whether they can be read, and their facts."""

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
    """Size in bytes and modification time in nanoseconds, by which a change of a file is detected."""

    bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Probe:
    """The result of probing a video. If it cannot be read, `reason` is set and the facts are None."""

    state: FileState | None  # None: the file is missing or not accessible
    frames: int | None = None  # decodable frames
    fps: float | None = None  # mean rate, also None if unknown
    width: int | None = None  # pixels, upright
    height: int | None = None
    quick_hash: str = ""
    reason: str = ""

    @property
    def good(self) -> bool:
        return self.frames is not None


def file_state(path: str) -> FileState | None:
    """Return the state of a file or a folder of frames (size: sum of its files), or None if it is not accessible."""
    try:
        found = os.stat(path)
        size = sum(entry.stat().st_size for entry in os.scandir(path)) if os.path.isdir(path) else found.st_size
    except OSError:
        return None
    return FileState(size, found.st_mtime_ns)


def probe(path: str, *, decoder: str = "pyav") -> Probe:
    """Read the first, middle and last frame of a video, and decode everything in between to detect damage anywhere."""
    state = file_state(path)
    announced = 0

    def pick(num_frames: int, fps: float | None) -> np.ndarray:
        nonlocal announced
        announced = announced or num_frames
        return np.array([0, num_frames // 2, num_frames - 1])

    try:
        decoded = read_clip(path, pick, decoder=decoder, seek=False)
        key = quick_hash(path)
    except VideoError as error:
        return Probe(state, reason=error.reason)
    height, width = decoded.frames.shape[1:3]
    # Some containers have a few packets without a frame; many of them mean a truncated file.
    missing = announced - decoded.num_frames
    reason = f"only {decoded.num_frames} of {announced} frames can be decoded" if missing > max(4, announced // 20) else ""
    return Probe(state, decoded.num_frames, decoded.fps, width, height, key, reason)


def quick_hash(path: str) -> str:
    """Hash a file's size and its first and last MiB (BLAKE2b, 32 hex digits); of a folder, its names and sizes."""
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
