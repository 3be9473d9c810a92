"""Records and protocols that the data package shares with the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:  # processes that only decode do not import torch
    from torch import Tensor

_PREFIX = "cannot read "


@dataclass(frozen=True)
class Video:
    """A labelled video: its path and the index of its class."""

    path: str
    label: int


@dataclass(frozen=True)
class VideoSource:
    """The videos of a dataset, as a dataset function returns them.

    A split without a list is an empty tuple. `notes` goes to the protocol of the results (lists used, videos in each).
    `missing` has the paths of the listed videos that do not exist, by split. `warnings` are one-line warnings about
    the lists.
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
    """A test video that could not be read: its index in the split, its path and the reason."""

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
    """A video cannot be read. `str()` is one line with the path and the reason.

    A DataLoader re-raises a worker's error by calling its class with one string, the worker's traceback. Path and
    reason are then parsed from the last line.
    """

    def __init__(self, path: str, reason: str | None = None) -> None:
        if reason is None:
            last_line = path.strip().rpartition("\n")[2]
            path, _, reason = last_line[max(0, last_line.find(_PREFIX)) :].removeprefix(_PREFIX).partition(": ")
        # pickle calls the class with Exception.args.
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return " ".join(f"{_PREFIX}{self.path}: {self.reason}".split())
