"""Manifest of a dataset: a table of its videos that says which can be read.

    manifest.csv      one row per video, written when all videos have been probed
    unfinished.csv    the rows so far of a run that has not finished

Paths are relative to the dataset's root if the video is under it. Labels are class names.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TextIO

from atfr.data.types import VideoSource
from atfr.data.video.probe import FileState, Probe
from atfr.utils.atomic_io import atomic_write

VERSION = 1  # increase it when the meaning of a row changes; older rows are then ignored
MANIFEST, UNFINISHED = "manifest.csv", "unfinished.csv"
SPLITS = ("train", "val", "test")
_MARK = "# "  # start of the first line, which holds the settings
COLUMNS = (
    "path", "label", "split", "frames", "fps", "width", "height", "seconds", "bytes", "mtime_ns", "quick_hash", "status", "reason",
)  # fmt: skip


@dataclass(frozen=True)
class ListedVideo:
    """A video of the dataset's lists, as it appears in the manifest."""

    path: str
    label: str  # "" if the video is missing, since the source does not tell
    split: str  # train, val, test, or several joined by +
    missing: bool


def listed_videos(source: VideoSource, root: str) -> list[ListedVideo]:
    """List each video once: for each split the existing videos in list order, then the missing ones."""
    found: dict[str, ListedVideo] = {}
    # Without a val list, the validation videos are the test videos.
    for split in (split for split in SPLITS if split != "val" or source.val is not source.test):
        named = [(video.path, source.class_names[video.label], False) for video in getattr(source, split)]
        for path, label, missing in [*named, *((path, "", True) for path in source.missing.get(split, ()))]:
            short = path_in_manifest(path, root)
            before = found.get(short)
            if before is None:
                found[short] = ListedVideo(short, label, split, missing)
            elif split not in before.split.split("+"):
                found[short] = replace(before, split=f"{before.split}+{split}")
    return list(found.values())


def path_in_manifest(path: str, root: str) -> str:
    """Return the path relative to `root`, or the path itself if it is not under `root`."""
    relative = os.path.relpath(path, root)
    relative = path if relative == ".." or relative.startswith("../") else relative
    return f"./{relative}" if relative.startswith("#") else relative  # a leading # marks a comment in a list


class Manifest:
    """The probes of a dataset's videos, saved in `folder` as they are added.

    Reads the rows of an earlier run if it had the same `settings`. From a finished manifest only good videos are taken,
    so that a second run probes the bad ones again.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.settings = {"version": VERSION, **settings}
        self._stream: TextIO | None = None
        self.probes: dict[str, Probe] = {path: probe for path, probe in self._read(MANIFEST).items() if probe.good}
        self.probes |= self._read(UNFINISHED)

    def knows(self, path: str, state: FileState | None) -> bool:
        """Return whether a video has a row and its file has not changed since."""
        return state is not None and path in self.probes and self.probes[path].state == state

    def add(self, video: ListedVideo, probe: Probe) -> None:
        """Add a row and write it at once."""
        if self._stream is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Rewrite the rows of the earlier run: its last row may be incomplete.
            known = [(ListedVideo(path, "", "", missing=False), before) for path, before in self.probes.items()]
            self._write(UNFINISHED, known)
            self._stream = _open(self.folder / UNFINISHED, "a")
        self.probes[video.path] = probe
        csv.writer(self._stream, lineterminator="\n").writerow(_row(video, probe))
        self._stream.flush()

    def finish(self, videos: Sequence[ListedVideo]) -> None:
        """Write manifest.csv with all of `videos`; those without a row are missing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write(MANIFEST, [(video, self.probes.get(video.path, Probe(None, reason="No such file"))) for video in videos])
        self.close()
        (self.folder / UNFINISHED).unlink(missing_ok=True)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _write(self, name: str, rows: Iterable[tuple[ListedVideo, Probe]]) -> None:
        with atomic_write(self.folder / name) as temporary, _open(temporary, "w") as file:
            file.write(f"{_MARK}{json.dumps(self.settings, ensure_ascii=True)}\n")
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *(_row(video, probe) for video, probe in rows)])

    def _read(self, name: str) -> dict[str, Probe]:
        try:
            settings, probes = read_manifest(self.folder / name)
        except (FileNotFoundError, ValueError):
            return {}
        return probes if settings == self.settings else {}


def read_manifest(path: Path) -> tuple[dict[str, Any], dict[str, Probe]]:
    """Return a manifest's settings (`version`, `dataset`, `root`, `decoder`, `copies`) and its probes by path.

    The state of a missing video is None.

    Raises:
        ValueError: the file is not a manifest.
    """
    with _open(path, "r") as file:
        first, *lines = file.readlines() or [""]
    try:
        settings = json.loads(first.removeprefix(_MARK)) if first.startswith(_MARK) else None
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is not a manifest of scripts/prepare.py")
    whole = [line for line in lines if line.endswith("\n")]  # a kill may leave an incomplete row
    probes = {}
    for row in csv.DictReader(whole):
        with suppress(ValueError, TypeError, KeyError):  # a row that was edited by hand
            probes[row["path"]] = _probe(row)
    return settings, probes


def _open(path: Path, mode: Literal["r", "w", "a"]) -> TextIO:
    # File names need not be UTF-8; surrogateescape keeps their bytes.
    return open(path, mode, newline="", encoding="utf-8", errors="surrogateescape")


def _row(video: ListedVideo, probe: Probe) -> tuple[Any, ...]:
    seconds = f"{probe.frames / probe.fps:.3f}" if probe.frames and probe.fps else ""
    state = ("", "") if probe.state is None else (probe.state.bytes, probe.state.mtime_ns)
    status = "good" if probe.good else "missing" if probe.state is None else "bad"
    facts = probe.frames, probe.fps and f"{probe.fps:.6g}", probe.width, probe.height, seconds
    return (video.path, video.label, video.split, *facts, *state, probe.quick_hash, status, probe.reason)


def _probe(row: Mapping[str, str]) -> Probe:
    def number(column: str) -> int | None:
        return int(row[column]) if row[column] else None

    return Probe(
        FileState(int(row["bytes"]), int(row["mtime_ns"])) if row["bytes"] else None,
        frames=number("frames"),
        fps=float(row["fps"]) if row["fps"] else None,
        width=number("width"),
        height=number("height"),
        quick_hash=row["quick_hash"],
        reason=row["reason"],
    )
