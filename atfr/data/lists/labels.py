"""Convert the labels of a dataset's lists to class ids, by one rule for all lists."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from atfr.data.lists.annotations import check_classes, none_of
from atfr.data.lists.format import Row

_ID = re.compile(r"([+-]?\d{1,18})(?:\.0*)?")
_NO_ID = re.compile(r"[+-]?(?:\d*\.\d+|\d{19,})")  # a number that is not a class id


@dataclass(frozen=True)
class VideoList:
    """A list as it is written: its file, and its rows with text labels."""

    file: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class Labels:
    """The classes, and the class ids of the rows of each list. `numbered`: the labels are ids, not names."""

    class_names: tuple[str, ...]
    ids: Mapping[str, list[int]]
    numbered: bool


def resolve_labels(lists: Mapping[str, VideoList], *, num_classes: int | None, class_names: Sequence[str] | None, name: str) -> Labels:
    """Find the classes of a dataset and the class id of each row of its lists, by split.

    Labels are class ids if all of them are numbers (`2.0` is the id 2) and no name in `class_names` is a number.
    Otherwise all of them must be names.

    Raises:
        ValueError: some labels are names and others are numbers, or a label is not a class.
    """
    given = None if class_names is None else tuple(map(str, class_names))
    if given is not None:
        check_classes(given, num_classes, where=f"dataset {name}: class_names")
    names_are_numbers = given is not None and any(as_id(item) is not None or _NO_ID.fullmatch(item) for item in given)
    if not names_are_numbers and _all_numbers(lists):
        classes = given or tuple(map(str, range(_count_ids(lists) if num_classes is None else num_classes)))
        return Labels(classes, {split: _ids(listed, len(classes)) for split, listed in lists.items()}, numbered=True)
    classes = given or _training_names(lists, num_classes)
    return Labels(classes, {split: _named_ids(listed, classes) for split, listed in lists.items()}, numbered=False)


@lru_cache(maxsize=10_000)  # a list has few different labels
def as_id(label: str) -> int | None:
    """Return the class id that a label stands for, or None. pandas writes integer columns with gaps as 2.0."""
    match = _ID.fullmatch(label)
    return int(match[1]) if match else None


def _all_numbers(lists: Mapping[str, VideoList]) -> bool:
    """Return whether all labels are ids; raise ValueError if only some are."""
    number = name = None
    for listed in lists.values():
        for row in listed.rows:
            if as_id(row.label) is not None:
                number = number or (listed.file, row)
            elif _NO_ID.fullmatch(row.label):
                raise ValueError(f"{listed.file}:{row.line}: label {row.label} is not an integer of up to 18 digits; if it is a name, give class_names")
            else:
                name = name or (listed.file, row)
            if number and name:
                raise ValueError(
                    f"{number[0]}:{number[1].line}: label {number[1].label!r} is a number, but label {name[1].label!r} ({name[0]}:{name[1].line})"
                    " is a name; use only numbers or only names in all lists, or give class_names if numbers are the names of classes"
                )
    return number is not None


def _count_ids(lists: Mapping[str, VideoList]) -> int:
    """Return the largest id plus one; raise ValueError if this is far more than the number of different labels."""
    ids = {number for listed in lists.values() for row in listed.rows if (number := as_id(row.label)) is not None}  # all labels are ids
    largest = max(ids)
    if largest > 1000 + 10 * len(ids):
        file, row = next((listed.file, row) for listed in lists.values() for row in listed.rows if as_id(row.label) == largest)
        raise ValueError(
            f"{file}:{row.line}: label {row.label} makes {largest + 1} classes, but the lists have only {len(ids)} different labels;"
            " number the classes from 0 without gaps, or set num_classes"
        )
    return max(largest, 0) + 1


def _training_names(lists: Mapping[str, VideoList], num_classes: int | None) -> tuple[str, ...]:
    if "train" not in lists:
        listed = next(iter(lists.values()))
        raise ValueError(
            f"{listed.file}:{listed.rows[0].line}: the labels are names ({listed.rows[0].label!r}), and no training list"
            " of names defines the classes; give class_names"
        )
    names = tuple(sorted({row.label for row in lists["train"].rows}))
    if num_classes is not None and num_classes != len(names):
        raise ValueError(
            f"{lists['train'].file}: num_classes is {num_classes}, but the training list names {len(names)} classes;"
            " leave num_classes out, or give class_names"
        )
    return names


def _ids(listed: VideoList, classes: int) -> list[int]:
    ids = [number for row in listed.rows if (number := as_id(row.label)) is not None]  # all labels are ids
    if min(ids) < 0 or max(ids) >= classes:
        row = next(row for row, number in zip(listed.rows, ids) if not 0 <= number < classes)
        raise ValueError(f"{listed.file}:{row.line}: label {row.label} is outside the {classes} classes (0 to {classes - 1})")
    return ids


def _named_ids(listed: VideoList, classes: Sequence[str]) -> list[int]:
    ids = {label: index for index, label in enumerate(classes)}
    # If class names are numbers, 2.0 is the class "2".
    ids = {**{row.label: ids[str(number)] for row in listed.rows if (number := as_id(row.label)) is not None and str(number) in ids}, **ids}
    for row in listed.rows:
        if row.label not in ids:
            raise ValueError(f"{listed.file}:{row.line}: label {row.label!r} is {none_of(classes)}")
    return [ids[row.label] for row in listed.rows]
