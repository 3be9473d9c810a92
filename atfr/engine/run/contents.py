"""What the files of a run hold, wherever they lie: compared when a run goes on, so that their places may change."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atfr.data.types import Video, VideoSource
from atfr.data.video.probe import quick_hash
from atfr.engine.run import run_dir

log = logging.getLogger(__name__)

SPLITS = {"train": "training", "test": "test", "val": "validation"}  # without a val list, the test list is meant by both
START, FILES = "start", "files"
LOOKED_AT = 4  # training videos, to tell other copies of a dataset


def contents(source: VideoSource, start: tuple[str, Path] | None) -> dict[str, str | None]:
    """Return hashes of each split's list, of some training videos, and of the weights that training starts from.

    Args:
        start: the option that names the weights, and their file; None: training starts from scratch.
    """
    found = {split: _of_list(getattr(source, split)) for split in SPLITS}
    found[FILES] = " ".join(_of_video(video) for video in source.train[:: -(-len(source.train) // LOOKED_AT) or 1])
    found[START] = None if start is None else _of_file(start[1])
    return found


def require_same_contents(before: Mapping[str, Any], now: Mapping[str, Any], *, of: Path, way_out: str, warn: bool = True) -> None:
    """Raise ValueError unless a run's files hold what they held when `of` was written; names the first split that changed.

    Of the videos, only a few are looked into: copies of another size are refused, a single file that was replaced is only warned of.
    """
    for split, name in SPLITS.items():
        if before.get(split) != now.get(split):
            raise ValueError(
                f"the {name} videos, their labels or their order are not those with which {of} was written: see dataset.root and dataset.{split}; {way_out}"
            )
    if before.get(START) != now.get(START):
        raise ValueError(f"model.weights or init_from names other weights than those that {of} started from, or none that are there; {way_out}")
    same = [one == other for one, other in zip(str(before.get(FILES)).split(), str(now.get(FILES)).split())]
    if same and not any(same):
        raise ValueError(f"the training videos have the names of those with which {of} was written, but are other files: see dataset.root; {way_out}")
    if warn and not all(same):
        log.warning("some training videos are other files than when %s was written: going on with them", of)


def same_contents(state: Mapping[str, Any], identity: Mapping[str, Any], *, of: Path, way_out: str, warn: bool) -> dict[str, Any]:
    """Compare what a checkpoint and this run say of their files; return `identity` with the weights that the run started from.

    Args:
        state: the checkpoint `of`, which the run goes on from.
        identity: what this run writes into its own checkpoints: `config`, `contents` and more.
    """
    before, now = state.get("contents"), identity.get("contents")
    if before is None or now is None:
        return dict(identity)
    then, here = run_dir.flat(state["config"]), run_dir.flat(identity["config"])
    if all(then.get(key) == here.get(key) for key in run_dir.START):
        now = {**now, START: before.get(START)}  # the file is not needed any more, and may be gone or another one
    require_same_contents(before, now, of=of, way_out=way_out, warn=warn)
    return {**identity, "contents": {**now, START: before.get(START)}}


def _of_video(video: Video) -> str:
    try:
        return quick_hash(video.path)
    except OSError:
        return "none"


def _of_list(videos: tuple[Video, ...]) -> str | None:
    """Hash the rows of a list, with paths from the deepest folder that has all of its videos."""
    if not videos:
        return None
    folders = {os.path.dirname(video.path) for video in videos}
    try:
        top = len(os.path.commonpath(folders).rstrip("/"))
    except ValueError:  # absolute and relative ones
        top = 0
    digest = hashlib.sha256()
    for video in videos:
        digest.update(f"{video.path[top:].lstrip('/')}\0{video.label}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _of_file(path: Path) -> str | None:
    if not path.is_file():
        return None
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
