"""Datasets given as lists of files: `path,label` a line, or PySlowFast's `path label`."""

from __future__ import annotations

import csv
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from atfr.data.annotations import find_file, open_root, read_lines, video_source
from atfr.data.records import Video, VideoSource

_PATH_COLUMNS = ("relative_path", "path", "video_path", "video", "filename", "file")
_LABEL_COLUMNS = ("label", "class", "class_id", "label_id", "class_name")
_INTEGER = re.compile(r"[+-]?\d+")
# "b.mp4 3": what a comma inside a path leaves behind in PySlowFast's space form.
_FILE_THEN_LABEL = re.compile(r".*\.\w{2,4}[\"']?\s+\S+")


@dataclass(frozen=True)
class _Row:
    line: int
    path: str
    label: str


@dataclass(frozen=True)
class _List:
    """A list as written: its file, and its rows with labels still text."""

    file: str
    rows: tuple[_Row, ...]

    @property
    def has_ids(self) -> bool:
        return all(_INTEGER.fullmatch(row.label) for row in self.rows)


def videolist(
    *,
    root: str,
    train: str | None,
    test: str | None,
    val: str | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    strip_prefix: str | None = None,
    allow_missing: bool = False,
    name: str = "videolist",
    prepare_hint: str = "",
) -> VideoSource:
    """Reads the lists of a dataset and checks that every video they name exists (`allow_missing` leaves out the others).

    - A list has one video a line, `path,label` (csv quoting; an optional header such as `relative_path,label`, which
      may name further columns) or `path label` (label last; quotes around a path with spaces are optional). Blank
      lines and lines that begin with `#` are skipped.
    - A list is looked for as given, relative to the working directory, then relative to `root`. Paths in a list are
      absolute or relative to `root`, which also stands for `strip_prefix`, the folder that they begin with on the
      machine of whoever wrote the list.
    - A list whose labels are all integers holds class ids, counted from 0; there are `num_classes` classes, or the
      largest id of all the lists plus one. Otherwise labels are names; the classes are `class_names` in that order,
      or the sorted names of the training list.
    - Without `val` the test list is the validation list, too. Without `train` the source is for testing only.

    Raises FileNotFoundError for a missing root, list or video and ValueError for a list that cannot be understood,
    always in one line; `prepare_hint` ("run ... first") ends the messages about missing files.
    """
    if train is None and test is None:
        raise ValueError(f"dataset {name}: neither a train nor a test list is given")
    root = open_root(root, name=name, hint=prepare_hint)

    lists: dict[str, _List] = {}
    for split, file in (("train", train), ("val", val), ("test", test)):
        if file is not None:
            lists[split] = _read_list(find_file(file, root=root, what=f"{split} list", name=name, hint=prepare_hint))
    classes = _class_names(lists, num_classes=num_classes, class_names=class_names, name=name)
    return video_source(
        name=name,
        root=root,
        files={split: listed.file for split, listed in lists.items()},
        videos={split: _videos(listed, root=root, classes=classes, strip_prefix=strip_prefix) for split, listed in lists.items()},
        class_names=classes,
        allow_missing=allow_missing,
        hint=prepare_hint,
    )


def _read_list(file: str) -> _List:
    lines = [(number, line) for number, line in read_lines(file) if not line.startswith("#")]
    if not lines:
        raise ValueError(f"{file}: the list is empty")
    split = _split_comma if _is_comma_form(lines[0][1]) else _split_space

    columns = _header_columns(split(lines[0][1]))
    rows = []
    for number, line in lines[0 if columns is None else 1 :]:
        fields = split(line)
        # Without a header there is nothing to say which of three columns is which.
        if (columns is None and len(fields) != 2) or (columns is not None and len(fields) <= max(columns)):
            raise ValueError(f"{file}:{number}: expected 'path,label' or 'path label', found {line!r}")
        path, label = (fields[column] for column in columns or (0, 1))
        if not path or not label:
            missing = "label" if path else "path"
            raise ValueError(f"{file}:{number}: the {missing} is missing in {line!r}")
        rows.append(_Row(number, path, label))
    if not rows:
        raise ValueError(f"{file}: the list is empty (it has only a header)")
    return _List(file, tuple(rows))


def _is_comma_form(line: str) -> bool:
    fields = _split_comma(line)
    return len(fields) > 1 and not _FILE_THEN_LABEL.fullmatch(fields[-1])


def _split_comma(line: str) -> list[str]:
    return [field.strip() for field in next(csv.reader([line], skipinitialspace=True))]


def _split_space(line: str) -> list[str]:
    if line[0] in "\"'" or line[-1] in "\"'":
        try:
            return shlex.split(line)
        except ValueError:  # a lone quote is part of a name, as in "person's head"
            pass
    return line.rsplit(None, 1)


def _header_columns(fields: list[str]) -> tuple[int, int] | None:
    """The columns of path and label if `fields` is a header, else None."""
    names = [field.lower() for field in fields]
    path = next((names.index(column) for column in _PATH_COLUMNS if column in names), None)
    label = next((names.index(column) for column in _LABEL_COLUMNS if column in names), None)
    return None if path is None or label is None else (path, label)


def _class_names(
    lists: dict[str, _List], *, num_classes: int | None, class_names: Sequence[str] | None, name: str
) -> tuple[str, ...]:
    if class_names is not None:
        classes = tuple(str(item) for item in class_names)
        twice = next((item for item in classes if classes.count(item) > 1), None)
        if twice is not None:
            raise ValueError(f"dataset {name}: class_names holds {twice!r} more than once")
        if num_classes is not None and num_classes != len(classes):
            raise ValueError(f"dataset {name}: num_classes is {num_classes}, but class_names holds {len(classes)}")
        return classes
    if all(listed.has_ids for listed in lists.values()):
        largest = max(int(row.label) for listed in lists.values() for row in listed.rows)
        return tuple(str(index) for index in range(largest + 1 if num_classes is None else num_classes))
    if "train" not in lists or lists["train"].has_ids:
        named = next(listed for listed in lists.values() if not listed.has_ids)
        raise ValueError(
            f"{named.file}:{named.rows[0].line}: the labels are names ({named.rows[0].label!r}), and no training list"
            " of names says which classes there are; give class_names"
        )
    names = tuple(sorted({row.label for row in lists["train"].rows}))
    if num_classes is not None and num_classes != len(names):
        raise ValueError(
            f"{lists['train'].file}: num_classes is {num_classes}, but the training list names {len(names)} classes;"
            " leave num_classes out, or give class_names"
        )
    return names


def _videos(listed: _List, *, root: str, classes: tuple[str, ...], strip_prefix: str | None) -> tuple[Video, ...]:
    folder = None if strip_prefix is None else strip_prefix.rstrip("/") + "/"
    if folder is not None and not listed.rows[0].path.startswith(folder):
        raise ValueError(f"{listed.file}:{listed.rows[0].line}: {listed.rows[0].path} does not begin with dataset.strip_prefix={strip_prefix}")
    ids = {label: index for index, label in enumerate(classes)}
    # Classes may themselves be called "0", "1", ...: labels that are all names of classes are names.
    as_ids = listed.has_ids and not all(row.label in ids for row in listed.rows)
    videos = []
    for row in listed.rows:
        label = int(row.label) if as_ids else ids.get(row.label)
        if as_ids and not 0 <= label < len(classes):
            raise ValueError(
                f"{listed.file}:{row.line}: label {row.label} is outside the {len(classes)} classes"
                f" (0 to {len(classes) - 1})"
            )
        if label is None:
            shown = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
            raise ValueError(
                f"{listed.file}:{row.line}: label {row.label!r} is none of the {len(classes)} classes ({shown})"
            )
        videos.append(Video(os.path.join(root, row.path.removeprefix(folder or "")), label))
    return tuple(videos)
