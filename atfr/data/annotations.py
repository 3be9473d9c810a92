"""What the lists of all datasets have in common: where they lie, their lines, and which of their videos are there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atfr.data.records import Video, VideoSource


@dataclass(frozen=True)
class Annotation:
    """A video as a list names it: its path from the folder of videos, and its class."""

    path: str
    class_name: str


def open_root(root: str, *, name: str, hint: str) -> str:
    """The absolute path of a dataset's folder; FileNotFoundError if there is none."""
    root = os.path.abspath(os.path.expanduser(root))
    if not os.path.isdir(root):
        raise FileNotFoundError(f"dataset {name}: root {root} is not a folder{after(hint)}")
    return root


def find_file(file: str, *, root: str, what: str, name: str, hint: str) -> str:
    """The absolute path of a file that is given relative to the working directory or to `root`.

    Raises FileNotFoundError, which calls the file `what`.
    """
    places = list(dict.fromkeys(os.path.abspath(os.path.join(start, os.path.expanduser(file))) for start in ("", root)))
    for place in places:
        if os.path.isfile(place):
            return place
    looked = " and ".join(places)
    raise FileNotFoundError(f"dataset {name}: the {what} {file} does not exist (looked for {looked}){after(hint)}")


def after(hint: str) -> str:
    """A hint as the end of a message."""
    return f"; {hint}" if hint else ""


def read_lines(file: str) -> list[tuple[int, str]]:
    """Line numbers, from 1, and lines without the blanks around them; blank lines are left out."""
    # utf-8-sig drops the byte order mark that spreadsheet programs write; a stray byte must not hide the other lines.
    with open(file, encoding="utf-8-sig", errors="surrogateescape") as stream:
        lines = [(number, line.strip()) for number, line in enumerate(stream, start=1)]
    return [(number, line) for number, line in lines if line]


def check_classes(classes: Sequence[str], num_classes: int | None, *, where: str) -> None:
    """Raise ValueError unless there are `num_classes` classes, all of them different."""
    twice = next((item for item in classes if classes.count(item) > 1), None)
    if twice is not None:
        raise ValueError(f"{where}: class {twice!r} is there more than once")
    if num_classes is not None and num_classes != len(classes):
        raise ValueError(f"{where}: {len(classes)} classes, but num_classes is {num_classes}; set dataset.num_classes=null if that is meant")


def labelled(annotations: Sequence[Annotation], *, videos: str, classes: Sequence[str], file: str) -> tuple[Video, ...]:
    """Videos under the folder `videos`; ValueError for a class that is none of `classes`."""
    ids = {class_name: index for index, class_name in enumerate(classes)}
    for item in annotations:
        if item.class_name not in ids:
            shown = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
            raise ValueError(f"{file}: the class {item.class_name!r} of {item.path} is none of the {len(classes)} classes ({shown})")
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
) -> VideoSource:
    """A dataset from the videos that its lists name, by split: train, val, test; each may be lacking.

    Without a val list the test list is the validation list, too. Videos that are not there are left out and named in
    `VideoSource.missing`; without `allow_missing`, and where a list has none left, they are a FileNotFoundError.
    """
    there: dict[str, tuple[Video, ...]] = {}
    missing: dict[str, tuple[str, ...]] = {}
    folders: dict[str, frozenset[str]] = {}
    for split, wanted in videos.items():
        gone = [video for video in wanted if not _exists(video.path, folders)]
        if gone and (not allow_missing or len(gone) == len(wanted)):
            raise FileNotFoundError(
                f"{files[split]}: {gone[0].path} does not exist ({len(gone)} of {len(wanted)} videos are missing;"
                f" root is {root}){after(hint)}"
            )
        left_out = set(gone)
        there[split] = tuple(video for video in wanted if video not in left_out)
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
            "videos": {split: len(found) for split, found in there.items()},
            **counted,
            "validation": "val list" if "val" in videos else "test list",
            **(notes or {}),
        },
        missing=missing,
    )


def _exists(path: str, folders: dict[str, frozenset[str]]) -> bool:
    # One listing a folder instead of one stat a video: Kinetics has 240,000 files, often on a network drive.
    folder, base = os.path.split(path)
    if folder not in folders:
        folders[folder] = frozenset(os.listdir(folder)) if os.path.isdir(folder) else frozenset()
    return base in folders[folder] or os.path.exists(path)
