"""The plain records that datasets hand to the rest of the package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:  # the processes that only decode do without torch
    from torch import Tensor

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


class ClipBatch(Protocol):
    """What training needs of a batch of N clips."""

    clips: Tensor  # uint8 [N, C, T, H, W]
    labels: Tensor  # int64 [N]
    paths: tuple[str, ...]  # N, the files of the clips
    bad: tuple[str, ...]  # one message for each unreadable video that another one replaces


class EvalBatch(Protocol):
    """What evaluation needs of a batch. N counts the clips that could be read."""

    clips: Tensor | None  # uint8 [N, C, T, H, W]; None if N is 0
    labels: Tensor  # int64 [N]
    paths: tuple[str, ...]  # N, the files of the clips
    videos: Tensor  # int64 [N], indices into the split
    views: Tensor  # int64 [N], see Clip.view
    decoders: tuple[str, ...]  # N, what read the clips
    failed: tuple[Unreadable, ...]  # the video of each clip that could not be read


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
