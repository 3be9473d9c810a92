"""Common code of all datasets: find and read their lists, and check that their videos exist."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atfr.data.lists.checks import list_warnings
from atfr.data.lists.existing import ExistingFiles, existing_path_hint
from atfr.data.lists.text import counted, read_text, some
from atfr.data.types import Video, VideoSource
from atfr.utils.paths import expanded

OFFICIAL_SPLITS = (1, 2, 3)  # of UCF101 and HMDB51

FORMAT = "write a list with a line path,label for each video, such as run/a.mp4,run (docs/extending.md has a dataset that reads folders of classes instead)"


@dataclass(frozen=True)
class Annotation:
    """A row of a list: the path of a video relative to the folder of videos, and its class."""

    path: str
    class_name: str


def open_root(root: str, *, name: str, hint: str) -> str:
    """Return the absolute path of a dataset's root; raise FileNotFoundError if it is not a folder."""
    root = os.path.abspath(expanded(root, "dataset.root"))
    if not os.path.isdir(root):
        raise FileNotFoundError(f"dataset {name}: root {root} is not a folder{hint_suffix(hint)}")
    return root


def open_split(root: str, split: int, *, name: str, hint: str) -> str:
    """Return the root of a dataset with three official splits; raise ValueError if `split` is not 1, 2 or 3."""
    if split not in OFFICIAL_SPLITS:
        raise ValueError(f"dataset.split is {split}, it must be 1, 2 or 3")
    return open_root(root, name=name, hint=hint)


def under(root: str, folder: str) -> str:
    """Return the path of a folder that is given relative to `root`, absolute or with `~`."""
    return os.path.join(root, expanded(folder))


def find_file(file: str, *, root: str, what: str, name: str, hint: str) -> str:
    """Return the absolute path of a file that is given relative to the working directory or to `root`.

    Raises:
        OSError: there is no such file, or it is a folder; the message calls it `what`.
    """
    paths = list(dict.fromkeys(os.path.abspath(os.path.join(start, expanded(file, what))) for start in ("", root)))
    found = next(filter(os.path.isfile, paths), None)
    if found is None and (folder := next(filter(os.path.isdir, paths), None)) is not None:
        raise IsADirectoryError(f"dataset {name}: the {what} {file} is a folder ({folder}), and a file is wanted; {hint or FORMAT}")
    if found is None:
        raise FileNotFoundError(f"dataset {name}: the {what} {file} does not exist (looked for {' and '.join(paths)}){hint_suffix(hint)}")
    return found


def find_lists(lists: Mapping[str, str | None], *, root: str, name: str, hint: str) -> dict[str, str]:
    """Find the lists of a dataset, by split, except those that are None; raise ValueError if all are None."""
    files = {split: find_file(file, root=root, what=f"{split} list", name=name, hint=hint) for split, file in lists.items() if file is not None}
    if not files:
        raise ValueError(f"dataset {name}: neither a train nor a test list is given")
    return files


def hint_suffix(hint: str) -> str:
    """Format a hint as the end of an error message."""
    return f"; {hint}" if hint else ""


def read_lines(file: str) -> list[tuple[int, str]]:
    """Read the non-blank lines of a text file, stripped, with their line numbers from 1."""
    lines = [(number, line.strip()) for number, line in enumerate(read_text(file).split("\n"), start=1)]
    return [(number, line) for number, line in lines if line]


def check_classes(classes: Sequence[str], num_classes: int | None, *, where: str) -> None:
    """Raise ValueError if a class is repeated, or there are not `num_classes` of them (None: any number)."""
    twice = next((item for item in classes if classes.count(item) > 1), None)
    if twice is not None:
        raise ValueError(f"{where}: class {twice!r} appears more than once")
    if num_classes is not None and num_classes != len(classes):
        raise ValueError(f"{where}: {counted(len(classes), 'class', 'classes')}, but num_classes is {num_classes}; set dataset.num_classes=null if this is intended")


def none_of(classes: Sequence[str]) -> str:
    """Format the end of an error message about a class that does not exist."""
    return f"none of the {len(classes)} classes ({some(classes, shown=8)})"


def to_videos(annotations: Sequence[Annotation], *, videos: str, classes: Sequence[str], file: str) -> tuple[Video, ...]:
    """Convert annotations to videos under the folder `videos`; raise ValueError for a class that is not in `classes`."""
    ids = {class_name: index for index, class_name in enumerate(classes)}
    for item in annotations:
        if item.class_name not in ids:
            raise ValueError(f"{file}: the class {item.class_name!r} of {item.path} is {none_of(classes)}")
    return tuple(Video(os.path.join(videos, item.path), ids[item.class_name]) for item in annotations)


def video_source(
    *,
    name: str,
    root: str,
    files: Mapping[str, str],
    videos: Mapping[str, tuple[Video, ...]],
    class_names: Sequence[str],
    allow_missing: bool,
    hint: str,
    notes: Mapping[str, Any] | None = None,
    lines: Mapping[str, Sequence[int]] | None = None,
    numbered: bool = False,
    existing: ExistingFiles | None = None,
) -> VideoSource:
    """Build a dataset from the videos in its lists, by split (train, val, test; each is optional).

    Without a val list, the test videos are the validation videos. Missing videos are left out and go to
    `VideoSource.missing`.

    Args:
        lines: the line number of each video, for splits where it is known; used in warnings.
        numbered: the labels in the lists are class ids, not names.
        existing: folders that were listed before.

    Raises:
        FileNotFoundError: a video is missing and `allow_missing` is False, or all videos of a list are missing.
    """
    there: dict[str, tuple[Video, ...]] = {}
    missing: dict[str, tuple[str, ...]] = {}
    existing = ExistingFiles() if existing is None else existing
    for split, wanted in videos.items():
        found: list[Video] = []
        gone: list[Video] = []
        for video in wanted:
            (found if video.path in existing else gone).append(video)
        if gone and (not allow_missing or len(gone) == len(wanted)):
            raise FileNotFoundError(
                f"{files[split]}: {gone[0].path} does not exist ({len(gone)} of {len(wanted)} videos are missing;"
                f" root is {root}){existing_path_hint(gone[0].path)}{hint_suffix(hint)}"
            )
        there[split] = tuple(found)
        missing[split] = tuple(video.path for video in gone)
    counted = {"missing": {split: len(paths) for split, paths in missing.items()}} if allow_missing else {}
    test = there.get("test", ())
    return VideoSource(
        name=name,
        train=there.get("train", ()),
        val=there.get("val", test),
        test=test,
        class_names=tuple(class_names),
        notes={
            "root": root,
            "lists": dict(files),
            "videos": {split: len(kept) for split, kept in there.items()},
            **counted,
            "validation": "val list" if "val" in videos else "test list",
            **(notes or {}),
        },
        missing=missing,
        warnings=list_warnings(
            videos, there, files=files, lines=lines or {}, class_names=class_names, numbered=numbered, is_link=existing.is_link
        ),
    )
