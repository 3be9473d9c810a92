"""From the labels of lists to class ids, by one rule for all lists of a dataset."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from atfr.data.lists.annotations import check_classes, none_of
from atfr.data.lists.format import Row

_ID = re.compile(r"([+-]?\d{1,18})(?:\.0*)?")
_NO_ID = re.compile(r"[+-]?(?:\d*\.\d+|\d{19,})")  # a number, but not that of a class


@dataclass(frozen=True)
class VideoList:
    """A list as it is written: its file, and its rows with labels still text."""

    file: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class Labels:
    """The classes, and the class ids of the rows of each list. `numbered`: the lists have ids, not names."""

    class_names: tuple[str, ...]
    ids: Mapping[str, list[int]]
    numbered: bool


def resolve_labels(lists: Mapping[str, VideoList], *, num_classes: int | None, class_names: Sequence[str] | None, name: str) -> Labels:
    """Find the classes of a dataset and the class id of every row of its lists, by split.

    Labels are class ids if those of all lists are numbers (`2.0` is the id 2) and no class in `class_names` is called by
    a number. Otherwise those of all lists must be names.

    Raises:
        ValueError: some labels are names and others are numbers, or a label is none of the classes.
    """
    given = None if class_names is None else tuple(map(str, class_names))
    if given is not None:
        check_classes(given, num_classes, where=f"dataset {name}: class_names")
    called_by_number = given is not None and any(as_id(item) is not None or _NO_ID.fullmatch(item) for item in given)
    if not called_by_number and _all_numbers(lists):
        classes = given or tuple(map(str, range(_count_ids(lists) if num_classes is None else num_classes)))
        return Labels(classes, {split: _ids(listed, len(classes)) for split, listed in lists.items()}, numbered=True)
    classes = given or _trained_names(lists, num_classes)
    return Labels(classes, {split: _named_ids(listed, classes) for split, listed in lists.items()}, numbered=False)


@lru_cache(maxsize=10_000)  # a list has few different labels
def as_id(label: str) -> int | None:
    """The number that a label is. pandas writes a column of integers with gaps as 2.0, which is 2."""
    match = _ID.fullmatch(label)
    return int(match[1]) if match else None


def _all_numbers(lists: Mapping[str, VideoList]) -> bool:
    """Whether the labels of all lists are ids; ValueError if only some are."""
    number = name = None
    for listed in lists.values():
        for row in listed.rows:
            if as_id(row.label) is not None:
                number = number or (listed.file, row)
            elif _NO_ID.fullmatch(row.label):
                raise ValueError(f"{listed.file}:{row.line}: label {row.label} is no integer of up to 18 digits; if it is a name, give class_names")
            else:
                name = name or (listed.file, row)
            if number and name:
                raise ValueError(
                    f"{number[0]}:{number[1].line}: label {number[1].label!r} is a number, but label {name[1].label!r} ({name[0]}:{name[1].line})"
                    " is a name; use only numbers or only names in all lists, or give class_names if numbers are the names of classes"
                )
    return number is not None


def _count_ids(lists: Mapping[str, VideoList]) -> int:
    """One more than the largest id; ValueError if that can only be a mistake, or as many classes would fill the memory."""
    ids = {as_id(row.label) for listed in lists.values() for row in listed.rows}
    largest = max(ids)
    if largest > 1000 + 10 * len(ids):
        file, row = next((listed.file, row) for listed in lists.values() for row in listed.rows if as_id(row.label) == largest)
        raise ValueError(
            f"{file}:{row.line}: label {row.label} makes {largest + 1} classes, but the lists have only {len(ids)} different labels;"
            " number the classes from 0 without gaps, or set num_classes"
        )
    return max(largest, 0) + 1


def _trained_names(lists: Mapping[str, VideoList], num_classes: int | None) -> tuple[str, ...]:
    if "train" not in lists:
        listed = next(iter(lists.values()))
        raise ValueError(
            f"{listed.file}:{listed.rows[0].line}: the labels are names ({listed.rows[0].label!r}), and no training list"
            " of names says which classes there are; give class_names"
        )
    names = tuple(sorted({row.label for row in lists["train"].rows}))
    if num_classes is not None and num_classes != len(names):
        raise ValueError(
            f"{lists['train'].file}: num_classes is {num_classes}, but the training list names {len(names)} classes;"
            " leave num_classes out, or give class_names"
        )
    return names


def _ids(listed: VideoList, classes: int) -> list[int]:
    ids = [as_id(row.label) for row in listed.rows]
    if min(ids) < 0 or max(ids) >= classes:
        row = next(row for row, number in zip(listed.rows, ids) if not 0 <= number < classes)
        raise ValueError(f"{listed.file}:{row.line}: label {row.label} is outside the {classes} classes (0 to {classes - 1})")
    return ids


def _named_ids(listed: VideoList, classes: Sequence[str]) -> list[int]:
    ids = {label: index for index, label in enumerate(classes)}
    # Where classes are called by numbers, 2.0 is the class "2".
    ids = {**{label: ids.get(str(number)) for label in {row.label for row in listed.rows} if (number := as_id(label)) is not None}, **ids}
    found = [ids.get(row.label) for row in listed.rows]
    if None in found:
        row = listed.rows[found.index(None)]
        raise ValueError(f"{listed.file}:{row.line}: label {row.label!r} is {none_of(classes)}")
    return found
