"""Read datasets from lists of paths and labels; the formats are described in `atfr.data.lists.format`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from atfr.data.lists.annotations import find_lists, open_root, video_source
from atfr.data.lists.existing import ExistingFiles
from atfr.data.lists.format import read_rows
from atfr.data.lists.labels import VideoList, resolve_labels
from atfr.data.types import Video, VideoSource

Locate = Callable[[tuple[Video, ...], str, ExistingFiles], tuple[Video, ...]]


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
    """Read the lists of a dataset and check that all videos exist (`allow_missing` leaves out missing ones).

    - A list has one video per line: `path,label`, with `;` or a tab instead of the comma, `path label`, or
      `path frames label`. A header such as `relative_path,label` allows other columns. Fields may be quoted as in csv
      files. A path is a video file or a folder of images.
    - Blank lines are skipped. A line that begins with `#` is a comment, unless it has the format of a row and its file
      exists.
    - The encoding is UTF-8, UTF-16, or UTF-32 with a byte order mark.
    - A list is searched relative to the working directory, then relative to `root`. Paths in a list are absolute, begin
      with `~`, or are relative to `root`. `strip_prefix` is removed from them first.
    - Labels are all numbers or all names. Numbers are class ids from 0; there are `num_classes` classes, or the largest id
      in all lists plus one. For names, the classes are `class_names`, or the sorted names of the training list.
    - Without `val`, the test list is also the validation list. Without `train`, the dataset is for testing only.

    Raises:
        FileNotFoundError: the root, a list or a video is missing; the message ends in `prepare_hint`.
        ValueError: a list cannot be read.
    """
    root = open_root(root, name=name, hint=prepare_hint)
    files = find_lists({"train": train, "val": val, "test": test}, root=root, name=name, hint=prepare_hint)
    source, numbered = path_source(
        files,
        root=root,
        num_classes=num_classes,
        class_names=class_names,
        strip_prefix=strip_prefix,
        allow_missing=allow_missing,
        name=name,
        hint=prepare_hint,
    )
    if class_names is None or not numbered:
        return source
    note = f"{' and '.join(files.values())}: labels are numbers and are used as positions in class_names (0 is {source.class_names[0]!r})"
    return replace(source, warnings=(note, *source.warnings))


def path_source(
    files: Mapping[str, str],
    *,
    root: str,
    num_classes: int | None,
    class_names: Sequence[str] | None,
    strip_prefix: str | None,
    allow_missing: bool,
    name: str,
    hint: str,
    locate: Locate = lambda videos, split, existing: videos,
) -> tuple[VideoSource, bool]:
    """Build a dataset from lists of paths, by split; also return whether the labels are numbers.

    `locate(videos, split, existing)` may replace paths that do not exist.
    """
    prefix = "" if strip_prefix is None else strip_prefix.rstrip("/") + "/"
    existing = ExistingFiles()

    def full(path: str) -> str:
        return os.path.join(root, os.path.expanduser(path.removeprefix(prefix)))

    lists = {split: VideoList(file, read_rows(file, exists=lambda path: full(path) in existing)) for split, file in files.items()}
    for listed in lists.values():
        for row in listed.rows:
            if not row.path.startswith(prefix):
                raise ValueError(f"{listed.file}:{row.line}: {row.path} does not begin with dataset.strip_prefix={strip_prefix}")
    labels = resolve_labels(lists, num_classes=num_classes, class_names=class_names, name=name)
    videos = {split: tuple(Video(full(row.path), label) for row, label in zip(listed.rows, labels.ids[split])) for split, listed in lists.items()}
    source = video_source(
        name=name,
        root=root,
        files=files,
        videos={split: locate(own, split, existing) for split, own in videos.items()},
        class_names=labels.class_names,
        allow_missing=allow_missing,
        hint=hint,
        lines={split: [row.line for row in listed.rows] for split, listed in lists.items()},
        numbered=labels.numbered,
        existing=existing,
    )
    return source, labels.numbered
