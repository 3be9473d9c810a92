"""Decoded clips kept on disk, for many runs that read the same clips: all of a seed, or all tests.

A run alone gains nothing, since another epoch takes other clips; twenty runs of one seed decode each clip once. What
is kept is what the decoder gave, so that a run's data are the same with and without. Nothing is ever deleted. A file that
is damaged is written anew, and a clip that cannot be written is not kept.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from atfr.data.video.decode import Decoded
from atfr.utils.atomic_io import written_whole
from atfr.data.video.readers import one_line
from atfr.data.warn_once import warn_once

VERSION = 2  # raise it when the same key comes to mean other frames, or files another format

log = logging.getLogger(__name__)


def cached(read: Callable[[], Decoded], folder: Path, path: str, key: tuple) -> Decoded:
    """Return `read()`, of the video `path`, or what it gave when it was last called with this key and the file was the same.

    `key` must say everything else that the result depends on. Raises what `read` raises, which is not kept.
    """
    try:
        state = os.stat(path)
    except OSError:
        return read()  # which knows how to complain
    name = hashlib.sha1(repr((VERSION, os.path.abspath(path), state.st_size, state.st_mtime_ns, key)).encode()).hexdigest()
    file = folder / name[:2] / f"{name}.npz"
    found = _load(file)
    if found is None:
        found = read()
        _save(found, file)
    return found


def _load(file: Path) -> Decoded | None:
    """Return the clip in a file, None if there is no such file or it is damaged."""
    try:
        with np.load(file) as kept:
            frames, fps = kept["frames"], float(kept["fps"])
            if frames.dtype != np.uint8 or frames.ndim != 4:
                raise ValueError(f"its frames are {frames.dtype} {list(frames.shape)}")
            return Decoded(frames, str(kept["decoder"]), int(kept["num_frames"]), None if np.isnan(fps) else fps)
    except FileNotFoundError:
        return None
    except Exception as error:  # zipfile, zlib and NumPy raise a dozen kinds over what a power cut may leave
        log.warning("dataset.clip.cache: %s cannot be read (%s); its clip is decoded again", file, one_line(error))
        return None


def _save(clip: Decoded, file: Path) -> None:
    fps = np.nan if clip.fps is None else clip.fps
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as temporary, open(temporary, "wb") as opened:
            np.savez(opened, frames=clip.frames, decoder=clip.decoder, num_frames=clip.num_frames, fps=fps)
    except OSError as error:
        why = f"cannot write to {file.parent.parent} ({one_line(error)})"
        warn_once(log, "cache", f"dataset.clip.cache: {why}; clips are decoded and not kept, which is slower in later runs")
