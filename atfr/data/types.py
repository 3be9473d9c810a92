"""The plain records that datasets hand to the rest of the package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_PREFIX = "cannot read "


@dataclass(frozen=True)
class Video:
    """One labelled video: where its file is and the index of its class."""

    path: str
    label: int


@dataclass(frozen=True)
class VideoSource:
    """What a dataset factory returns.

    A split that was not asked for is an empty tuple. `notes` holds the facts that belong in the protocol of the
    results (the lists used, how many videos each has), `missing`, by split, the paths of listed videos that
    are not there and were left out. `warnings` says what is suspicious about the lists, each in one line.
    """

    name: str
    train: tuple[Video, ...]
    val: tuple[Video, ...]
    test: tuple[Video, ...]
    class_names: tuple[str, ...]
    notes: dict[str, Any]
    missing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class Unreadable(NamedTuple):
    """A test video that could not be read: its index in the split, its file, and why."""

    video: int
    path: str
    reason: str


class VideoError(Exception):
    """A video that cannot be read: `path` names the file, `reason` says why; `str()` is one line with both.

    A DataLoader hands on what a worker raised by calling the class with one string, the worker's traceback; path and
    reason are then taken from its last line.
    """

    def __init__(self, path: str, reason: str | None = None) -> None:
        if reason is None:
            last_line = path.strip().rpartition("\n")[2]
            path, _, reason = last_line[max(0, last_line.find(_PREFIX)) :].removeprefix(_PREFIX).partition(": ")
        # Both values go to Exception.args: that is what pickle calls the class with in another process.
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return " ".join(f"{_PREFIX}{self.path}: {self.reason}".split())
