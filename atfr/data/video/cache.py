"""Cache decoded clips on disk, for runs that read the same clips: runs with the same seed, or tests.

A single run gains nothing, since each epoch reads other clips. The cache stores decoder output, so data are the same with
and without it. Files are never deleted. Damaged files are replaced. If the folder cannot be used, a run continues
without the cache.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from atfr.data.video.decode import Decoded
from atfr.data.video.readers import one_line
from atfr.data.warn_once import warn_once
from atfr.utils.atomic_io import atomic_write

VERSION = 2  # increase it when the meaning of a key or the file format changes

log = logging.getLogger(__name__)


def cached(read: Callable[[], Decoded], folder: Path, path: str, key: tuple) -> Decoded:
    """Return the cached clip of `path`; on a miss, or if the file changed, call `read` and store the result.

    `key` must contain everything else that the result depends on. Errors of `read` are raised and not stored.
    """
    try:
        state = os.stat(path)
    except OSError:
        return read()  # raises the error
    name = hashlib.sha1(repr((VERSION, os.path.abspath(path), state.st_size, state.st_mtime_ns, key)).encode()).hexdigest()
    file = folder / name[:2] / f"{name}.npz"
    try:
        found = _load(file)
    except OSError as error:
        _warn_of_folder(f"cannot read from {folder}", error)
        return read()
    if found is None:
        found = read()
        _save(found, file)
    return found


def _load(file: Path) -> Decoded | None:
    """Return the clip in a file, or None if the file is missing or damaged. Raise OSError if it is not accessible."""
    try:
        with np.load(file) as kept:
            frames, fps = kept["frames"], float(kept["fps"])
            if frames.dtype != np.uint8 or frames.ndim != 4:
                raise ValueError(f"its frames are {frames.dtype} {list(frames.shape)}")
            return Decoded(frames, str(kept["decoder"]), int(kept["num_frames"]), None if np.isnan(fps) else fps)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # zipfile, zlib and NumPy raise many types of errors for damaged files
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: a damaged file has an invalid offset
            raise
        log.warning("dataset.clip.cache: %s cannot be read (%s); the clip is decoded again", file, one_line(error))
        return None


def _save(clip: Decoded, file: Path) -> None:
    fps = np.nan if clip.fps is None else clip.fps
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as temporary, open(temporary, "wb") as opened:
            np.savez(opened, frames=clip.frames, decoder=clip.decoder, num_frames=clip.num_frames, fps=fps)
    except OSError as error:
        _warn_of_folder(f"cannot write to {file.parent.parent}", error)


def _warn_of_folder(what: str, error: OSError) -> None:
    warn_once(log, "cache", f"dataset.clip.cache: {what} ({one_line(error)}); clips are decoded without the cache")
