"""Hashes of the data files of a run. A run that resumes compares them, so the files may move but not change."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atfr.data.lists.text import some
from atfr.data.types import Video, VideoSource
from atfr.data.video.probe import quick_hash
from atfr.engine.run import checkpoint, run_dir

log = logging.getLogger(__name__)

SPLITS = {"train": "training", "test": "test", "val": "validation"}  # test before val: without a val list both are the test list
START, FILES = "start", "files"
HASHED_VIDEOS = 4  # training videos whose contents are hashed, to recognise other copies of a dataset


def contents(source: VideoSource, start: Path | None) -> dict[str, str | None]:
    """Hash the list of each split, some training videos, and the weights that training starts from.

    Args:
        start: the file of the weights; None: training starts from scratch.
    """
    found = {split: _of_list(getattr(source, split)) for split in SPLITS}
    found[FILES] = " ".join(_of_video(video) for video in source.train[:: -(-len(source.train) // HASHED_VIDEOS) or 1])
    found[START] = None if start is None else _of_file(start)
    return found


def require_same_contents(before: Mapping[str, Any], now: Mapping[str, Any], *, of: Path, way_out: str, warn: bool = True) -> None:
    """Raise ValueError if files changed since `of` was written; names the first split that did.

    Only a few training videos are compared. It is an error if all of them changed, and a warning (with `warn`) if some did.
    """
    for split, name in SPLITS.items():
        if before.get(split) != now.get(split):
            raise ValueError(
                f"the {name} videos, their labels or their order changed since {of} was written: see dataset.root and dataset.{split}; {way_out}"
            )
    if before.get(START) != now.get(START):
        raise ValueError(f"model.weights or init_from names other weights than those that {of} started from, or a file that does not exist; {way_out}")
    same = [one == other for one, other in zip(str(before.get(FILES)).split(), str(now.get(FILES)).split())]
    if same and not any(same):
        raise ValueError(f"the training videos have the same names as when {of} was written, but other contents: see dataset.root; {way_out}")
    if warn and not all(same):
        log.warning("some training videos changed since %s was written; continuing with them", of)


def checked_identity(state: Mapping[str, Any], identity: Mapping[str, Any], *, of: Path, way_out: str, warn: bool) -> dict[str, Any]:
    """Compare the files of a checkpoint with those of this run, and return the identity for the next checkpoints.

    Args:
        state: the checkpoint `of`, from which the run resumes.
        identity: `config`, `contents` and more of this run. The hash of the weights that training started from is replaced by
            that of the checkpoint.

    Raises:
        ValueError: as `require_same_contents`, or the classes changed.
    """
    before, now = state.get("contents"), identity.get("contents")
    checked = dict(identity)
    if before is not None and now is not None:
        then, here = run_dir.flat(state["config"]), run_dir.flat(identity["config"])
        if all(then.get(key) == here.get(key) for key in run_dir.START):
            now = {**now, START: before.get(START)}  # the same path: the file is not needed any more, and may be gone or have changed
        require_same_contents(before, now, of=of, way_out=way_out, warn=warn)
        checked["contents"] = {**now, START: before.get(START)}
    classes = [state["class_names"], list(identity["class_names"])]
    if classes[0] != classes[1]:
        raise ValueError(f"the training list or its classes changed since {of} was written ({some(classes[0])} then, {some(classes[1])} now); {way_out}")
    return checked


def resumed_step(folder: Path, identity: Mapping[str, Any]) -> int | None:
    """Return the step from which a training resumes, and compare its files, before anything is written into its folder.

    Returns:
        None if there is no checkpoint, or a damaged one, for which the trainer looks for an earlier one.

    Raises:
        ValueError: as `checked_identity`.
    """
    last = folder / run_dir.OUTPUT["training"]
    try:
        state = checkpoint.load(last, mmap=True)
    except (OSError, ValueError):
        return None
    checked_identity(state, identity, of=last, way_out=run_dir.way_out(folder), warn=False)
    return int(state["step"])


def _of_video(video: Video) -> str:
    try:
        return quick_hash(video.path)
    except OSError:
        return "none"


def _of_list(videos: tuple[Video, ...]) -> str | None:
    """Hash the rows of a list, with paths relative to the deepest folder that contains all videos."""
    if not videos:
        return None
    folders = {os.path.dirname(video.path) for video in videos}
    try:
        top = len(os.path.commonpath(folders).rstrip("/"))
    except ValueError:  # absolute and relative paths
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
