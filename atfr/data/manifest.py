"""A table of a dataset's videos, and whether each can be read.

    manifest.csv      a row a video; there only when all of them are known
    unfinished.csv    rows as they come, until the run is through

Paths are relative to the dataset's root where the video lies under it, and labels are names of classes.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from atfr.data.types import VideoSource
from atfr.data.video.probe import FileState, Probe
from atfr.utils.atomic_io import written_whole

VERSION = 1  # raise it when rows come to mean something else: old ones are then made anew
MANIFEST, UNFINISHED = "manifest.csv", "unfinished.csv"
SPLITS = ("train", "val", "test")
_MARK = "# "  # begins the first line
COLUMNS = (
    "path", "label", "split", "frames", "fps", "width", "height", "seconds", "bytes", "mtime_ns", "quick_hash", "status", "reason",
)  # fmt: skip


@dataclass(frozen=True)
class Listed:
    """A video of the dataset's lists, as in the manifest."""

    path: str
    label: str  # "" where the video is missing: the source does not tell then
    split: str  # train, val or test, with + between several
    missing: bool


def listed_videos(source: VideoSource, root: str) -> list[Listed]:
    """Each video once: by split, those that are there in the order of the list, and then those that are not."""
    found: dict[str, Listed] = {}
    # Without a val list the test videos are the validation videos, too.
    for split in (split for split in SPLITS if split != "val" or source.val is not source.test):
        named = [(video.path, source.class_names[video.label], False) for video in getattr(source, split)]
        for path, label, missing in [*named, *((path, "", True) for path in source.missing.get(split, ()))]:
            short = shorter(path, root)
            before = found.get(short)
            if before is None:
                found[short] = Listed(short, label, split, missing)
            elif split not in before.split.split("+"):
                found[short] = replace(before, split=f"{before.split}+{split}")
    return list(found.values())


def shorter(path: str, root: str) -> str:
    """A path from `root` on, if it lies there."""
    relative = os.path.relpath(path, root)
    relative = path if relative == ".." or relative.startswith("../") else relative
    return f"./{relative}" if relative.startswith("#") else relative  # `#` begins a comment in a list


class Manifest:
    """The rows that are known, in the folder that they are kept in.

    `settings` is what the rows depend on; those that were made with others are not taken over. Of a finished manifest
    only good videos are, so that a second run looks again at the bad ones.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.settings = {"version": VERSION, **settings}
        self._stream: TextIO | None = None
        self.probes: dict[str, Probe] = {path: probe for path, probe in self._read(MANIFEST).items() if probe.good}
        self.probes |= self._read(UNFINISHED)

    def knows(self, path: str, state: FileState | None) -> bool:
        """Whether a video has a row from when it was as it is now."""
        return state is not None and path in self.probes and self.probes[path].state == state

    def add(self, video: Listed, probe: Probe) -> None:
        """Note a row, in the file at once."""
        if self._stream is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Anew, with what is known: the end of a file that was being written may be half a row.
            known = [(Listed(path, "", "", missing=False), before) for path, before in self.probes.items()]
            self._write(UNFINISHED, known)
            self._stream = _open(self.folder / UNFINISHED, "a")
        self.probes[video.path] = probe
        csv.writer(self._stream, lineterminator="\n").writerow(_row(video, probe))
        self._stream.flush()

    def finish(self, videos: Sequence[Listed]) -> None:
        """Write manifest.csv, which has all of `videos` (those not added are missing)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write(MANIFEST, [(video, self.probes.get(video.path, Probe(None, reason="No such file"))) for video in videos])
        self.close()
        (self.folder / UNFINISHED).unlink(missing_ok=True)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _write(self, name: str, rows: Iterable[tuple[Listed, Probe]]) -> None:
        with written_whole(self.folder / name) as temporary, _open(temporary, "w") as file:
            file.write(f"{_MARK}{json.dumps(self.settings, ensure_ascii=True)}\n")
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *(_row(video, probe) for video, probe in rows)])

    def _read(self, name: str) -> dict[str, Probe]:
        try:
            settings, probes = read_manifest(self.folder / name)
        except (FileNotFoundError, ValueError):
            return {}
        return probes if settings == self.settings else {}


def read_manifest(path: Path) -> tuple[dict[str, Any], dict[str, Probe]]:
    """What a manifest's rows depend on (`version`, `dataset`, `root`, `decoder`, `copies`), and its videos by path.

    The state of those that were missing is None. Raises ValueError for a file that is no manifest.
    """
    with _open(path, "r") as file:
        first, *lines = file.readlines() or [""]
    try:
        settings = json.loads(first.removeprefix(_MARK)) if first.startswith(_MARK) else None
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is not a manifest of scripts/prepare.py")
    whole = [line for line in lines if line.endswith("\n")]  # a kill may have left half a row
    probes = {}
    for row in csv.DictReader(whole):
        with suppress(ValueError, TypeError, KeyError):  # what somebody has edited
            probes[row["path"]] = _probe(row)
    return settings, probes


def _open(path: Path, mode: str) -> TextIO:
    # Names of files need not be UTF-8; they are written back as the bytes they came from.
    return open(path, mode, newline="", encoding="utf-8", errors="surrogateescape")


def _row(video: Listed, probe: Probe) -> tuple[Any, ...]:
    missing = probe.state is None
    seconds = f"{probe.frames / probe.fps:.3f}" if probe.frames and probe.fps else ""
    state = ("", "") if missing else (probe.state.bytes, probe.state.mtime_ns)
    status = "good" if probe.good else "missing" if missing else "bad"
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
