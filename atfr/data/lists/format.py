"""Detect and read the formats of lists of videos.

    path,label         or ; or a tab instead of the comma; csv quoting; an optional header names the columns
    path label         PySlowFast; quotes around a path or label with blanks are optional
    path frames label  TSN and mmaction2, for folders of frames; other orders need a header, such as path label frames
"""

from __future__ import annotations

import csv
import re
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from atfr.data.lists.annotations import read_lines

_PATH_COLUMNS = (
    "relative_path", "path", "video_path", "file_path", "filepath", "video", "filename", "file_name", "file", "video_name", "video_id", "vid", "clip",
    "folder", "frame_dir", "name", "id",
)  # fmt: skip
_LABEL_COLUMNS = ("label", "class", "class_id", "label_id", "class_name", "label_name", "classname", "category", "target", "action", "activity")
_ORDER_HINT = "; if the columns are path, label, frames, add the header 'path label frames'"
_ORDERED = 20  # least number of rows for checking the order of columns
_SAMPLE = 100  # rows that the format is detected from
# A whole row after the last separator (`d, e.mp4 1`) means that the separator belongs to the path.
_FILE_THEN_LABEL = re.compile(r".*\.\w{2,4}[\"']?[\s,;]+\S+")
_HEADER_WORD = re.compile(r"[A-Za-z][A-Za-z _-]*")


class Row(NamedTuple):
    """A row of a list: its line number, and path and label as they are written."""

    line: int
    path: str
    label: str


@dataclass(frozen=True)
class _Format:
    """The format of a list. `path` and `label` are column numbers. A blank as `separator` stands for one or more."""

    separator: str
    columns: int = 2
    path: int = 0
    label: int = 1
    named: bool = False  # a header names the columns
    frames: bool = False  # the column between path and label is the number of frames

    def fields(self, line: str) -> list[str]:
        fields = _split(line, self.separator, self.columns)
        # Several tabs in a row may align the labels.
        return fields if self.named or self.separator != "\t" else [field for field in fields if field]

    def row(self, number: int, line: str, file: str) -> Row:
        fields = self.fields(line)
        enough = len(fields) > max(self.path, self.label) if self.named else len(fields) == self.columns
        if not enough or (self.frames and not (fields[1].isdecimal() and int(fields[1]) > 0)):
            expected = "'path frames label'" if self.frames else "'path,label' or 'path label'"
            hint = "" if len(fields) < 3 else _ORDER_HINT if self.frames else "; for more columns, add a header that names them, such as path,label,group"
            raise ValueError(f"{file}:{number}: expected {expected}, found {line!r}{hint}")
        path, label = fields[self.path], fields[self.label]
        if not path or not label:
            raise ValueError(f"{file}:{number}: the {'label' if path else 'path'} is missing in {line!r}")
        return Row(number, path, label)


def read_rows(file: str, exists: Callable[[str], bool]) -> list[Row]:
    """Read a list of videos. `exists` tells whether a path in the list exists.

    A line that begins with `#` is a row if it has the format of one and its file exists, otherwise a comment.

    Raises:
        ValueError: the list is empty or cannot be understood.
    """
    lines = read_lines(file)
    plain = [(number, line) for number, line in lines if not line.startswith("#")] or lines
    if not plain:
        raise ValueError(f"{file}: the list is empty")
    form = _detect_format(file, plain, exists)
    rows = []
    for number, line in lines:
        if form.named and number == plain[0][0]:
            continue
        if not line.startswith("#"):
            rows.append(form.row(number, line, file))
        elif (row := _hash_row(form, number, line, file)) is not None and exists(row.path):
            rows.append(row)
    if not rows:
        raise ValueError(f"{file}: the list is empty{' (it has only a header)' if form.named else ''}")
    if form.frames and _label_before_frames([fields[1:] for _, line in plain if len(fields := form.fields(line)) == 3]):
        raise ValueError(f"{file}: the columns seem to be path, label, frames; add the header 'path label frames'")
    if not form.named and _seems_header(rows) and not exists(rows[0].path):
        raise ValueError(f"{file}:{rows[0].line}: {plain[0][1]!r} seems to be a header: name its columns path and label, or remove the line")
    return rows


def _hash_row(form: _Format, number: int, line: str, file: str) -> Row | None:
    try:
        return form.row(number, line, file)
    except ValueError:
        return None


def _label_before_frames(rows: Sequence[Sequence[str]]) -> bool:
    """Return whether (frames, label) seem swapped: the first are few values without gaps, the second are never 0."""
    if len(rows) < _ORDERED or not all(label.isdecimal() for _, label in rows):
        return False
    first, second = ({int(value) for value in column} for column in zip(*rows))
    return 0 not in second and 2 * len(first) <= len(second) and max(first) <= 2 * len(first)


def _seems_header(rows: Sequence[Row]) -> bool:
    """Return whether the first row is two words, and the second is not the label of another row."""
    first, *others = rows
    words = all(_HEADER_WORD.fullmatch(field) for field in (first.path, first.label))
    return words and bool(others) and all(row.label != first.label for row in others)


def _detect_format(file: str, lines: Sequence[tuple[int, str]], exists: Callable[[str], bool]) -> _Format:
    sample = [line for _, line in lines[:_SAMPLE]]
    separator = _separator(sample)
    header = [field.lower() for field in _split(sample[0], separator, None)]
    path, label = (next((header.index(name) for name in names if name in header), None) for names in (_PATH_COLUMNS, _LABEL_COLUMNS))
    if path is not None and label is not None:
        return _Format(separator, len(header), path, label, named=True)
    if separator == " " and (columns := _blank_columns(file, lines[:_SAMPLE], exists)) == 3:
        return _Format(separator, columns, label=2, frames=True)
    return _Format(separator)


def _separator(lines: Sequence[str]) -> str:
    """Return the separator between path and label in most lines; a blank if no other one is in half of them."""

    def separates(line: str, separator: str) -> bool:
        fields = _split(line, separator, None) if separator in line else ()
        return len(fields) > 1 and not _FILE_THEN_LABEL.fullmatch(fields[-1])

    counts = {separator: sum(separates(line, separator) for line in lines) for separator in "\t;,"}
    best = max(counts, key=counts.__getitem__)
    return best if 2 * counts[best] >= len(lines) else " "


def _blank_columns(file: str, lines: Sequence[tuple[int, str]], exists: Callable[[str], bool]) -> int:
    """Return the number of columns in a list separated by blanks: 3 if a number of frames precedes the label, or else 2.

    Paths may contain blanks, so ambiguous lists are decided by which paths exist.
    """
    numbers = [_numbers_at_end(line) for _, line in lines]
    usual = Counter(numbers).most_common(1)[0][0]
    if usual < 2:
        return 2
    alike = [(number, line) for (number, line), count in zip(lines, numbers) if count == usual]
    for columns in (2, 3):
        if any(exists(_split(line, " ", columns)[0]) for _, line in alike):
            return columns
    if usual > 2:
        number, line = alike[0]
        raise ValueError(
            f"{file}:{number}: {line!r} ends in {usual} numbers; expected 'path label' or 'path frames label'"
            " (parts of a video and several labels per video are not supported)"
        )
    return 3


def _numbers_at_end(line: str) -> int:
    """Return how many numbers a line ends in, not counting its first field."""
    count = 0
    for field in reversed(line.split()[1:]):
        if not field.isdecimal():
            break
        count += 1
    return count


def _split(line: str, separator: str, columns: int | None) -> list[str]:
    """Split a line into fields; at blanks into at most `columns`, where the path keeps further blanks."""
    if separator != " ":
        fields = next(csv.reader([line], delimiter=separator, skipinitialspace=True)) if '"' in line else line.split(separator)
        return [field.strip() for field in fields]
    if line[0] in "\"'" or line[-1] in "\"'":
        try:
            return shlex.split(line)
        except ValueError:  # a single quote is part of a name, as in "person's head"
            pass
    return line.rsplit(None, -1 if columns is None else columns - 1)
