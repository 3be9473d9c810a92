"""Decoded clips kept on disk, for many runs that read the same clips: all of a seed, or all tests.

A run alone gains nothing, since another epoch takes other clips; twenty runs of one seed decode each clip once. What
is kept is what the decoder gave, so that a run's data are the same with and without. Nothing is ever deleted.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from atfr.data.decode import Decoded


def cached(read: Callable[[], Decoded], folder: Path, path: str, key: tuple) -> Decoded:
    """`read()`, of the video `path`; or what it gave when it was last called with this key and the file was the same.

    `key` must say everything else that the result depends on. Raises what `read` raises, which is not kept.
    """
    try:
        state = os.stat(path)
    except OSError:
        return read()  # which knows how to complain
    name = hashlib.sha1(repr((os.path.abspath(path), state.st_size, state.st_mtime_ns, key)).encode()).hexdigest()
    file = folder / name[:2] / f"{name}.npz"
    if file.exists():
        with np.load(file) as kept:
            fps = float(kept["fps"])
            return Decoded(kept["frames"], str(kept["decoder"]), int(kept["num_frames"]), None if np.isnan(fps) else fps)
    found = read()
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    with open(partial, "wb") as opened:
        np.savez(opened, frames=found.frames, decoder=found.decoder, num_frames=found.num_frames, fps=np.nan if found.fps is None else found.fps)
    os.replace(partial, file)  # whole or not at all, whoever else writes the same
    return found
