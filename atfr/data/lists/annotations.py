"""What the lists of all datasets have in common: where they lie, their lines, and which of their videos are there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atfr.data.lists.checks import list_warnings
from atfr.data.lists.existing import ExistingFiles, instead_of
from atfr.data.lists.text import read_text, some
from atfr.data.types import Video, VideoSource
from atfr.utils.paths import expanded


@dataclass(frozen=True)
class Annotation:
    """A video as a list names it: its path from the folder of videos, and its class."""

    path: str
    class_name: str


def open_root(root: str, *, name: str, hint: str) -> str:
    """The absolute path of a dataset's folder; FileNotFoundError if there is none."""
    root = os.path.abspath(expanded(root, "dataset.root"))
    if not os.path.isdir(root):
        raise FileNotFoundError(f"dataset {name}: root {root} is not a folder{after(hint)}")
    return root


def under(root: str, folder: str) -> str:
    """The path of a folder that is given from `root`, absolute or with `~`."""
    return os.path.join(root, expanded(folder))


def find_file(file: str, *, root: str, what: str, name: str, hint: str) -> str:
    """The absolute path of a file that is given relative to the working directory or to `root`.

    Raises FileNotFoundError, which calls the file `what`.
    """
    places = list(dict.fromkeys(os.path.abspath(os.path.join(start, expanded(file, what))) for start in ("", root)))
    for place in places:
        if os.path.isfile(place):
            return place
    looked = " and ".join(places)
    raise FileNotFoundError(f"dataset {name}: the {what} {file} does not exist (looked for {looked}){after(hint)}")


def find_lists(lists: Mapping[str, str | None], *, root: str, name: str, hint: str) -> dict[str, str]:
    """Find the lists of a dataset, by split; those that are None are left out. Raises ValueError if all are."""
    files = {split: find_file(file, root=root, what=f"{split} list", name=name, hint=hint) for split, file in lists.items() if file is not None}
    if not files:
        raise ValueError(f"dataset {name}: neither a train nor a test list is given")
    return files


def after(hint: str) -> str:
    """A hint as the end of a message."""
    return f"; {hint}" if hint else ""


def read_lines(file: str) -> list[tuple[int, str]]:
    """Line numbers, from 1, and lines without the blanks around them; blank lines are left out."""
    lines = [(number, line.strip()) for number, line in enumerate(read_text(file).split("\n"), start=1)]
    return [(number, line) for number, line in lines if line]


def check_classes(classes: Sequence[str], num_classes: int | None, *, where: str) -> None:
    """Raise ValueError unless there are `num_classes` classes, all of them different."""
    twice = next((item for item in classes if classes.count(item) > 1), None)
    if twice is not None:
        raise ValueError(f"{where}: class {twice!r} is there more than once")
    if num_classes is not None and num_classes != len(classes):
        raise ValueError(f"{where}: {len(classes)} classes, but num_classes is {num_classes}; set dataset.num_classes=null if that is meant")


def none_of(classes: Sequence[str]) -> str:
    """The end of a message about a class that does not exist."""
    return f"none of the {len(classes)} classes ({some(classes, shown=8)})"


def labelled(annotations: Sequence[Annotation], *, videos: str, classes: Sequence[str], file: str) -> tuple[Video, ...]:
    """Videos under the folder `videos`; ValueError for a class that is none of `classes`."""
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
    """A dataset from the videos that its lists name, by split: train, val, test; each may be lacking.

    Without a val list the test list is the validation list, too. Videos that are not there are left out and named in
    `VideoSource.missing`; without `allow_missing`, and where a list has none left, they are a FileNotFoundError. What is
    suspicious becomes `VideoSource.warnings`: `lines` has the line number of each video, for splits where they are
    known, and `numbered` says that the labels in the lists are ids. `existing` has the folders that were listed before.
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
                f" root is {root}){instead_of(gone[0].path)}{after(hint)}"
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
