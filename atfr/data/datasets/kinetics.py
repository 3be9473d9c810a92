"""Kinetics-400 and -600 (Kay et al., 2017; Carreira et al., 2018) from their official lists, or from PySlowFast's."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from atfr.data.datasets.videolist import read_path_lists
from atfr.data.lists.annotations import Annotation, check_classes, find_file, find_lists, labelled, open_root, read_lines, video_source
from atfr.data.lists.existing import ExistingFiles, stem
from atfr.data.lists.text import read_text
from atfr.data.lists.video_index import VideoIndex, youtube_id
from atfr.data.types import Video, VideoSource

_COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split")
# What the folder of a split may be called, by the split's name in the lists.
_FOLDERS = {split: ("val", "validate", "validation") for split in ("val", "validate", "validation")}


@dataclass(frozen=True)
class Segment:
    """A row of an official list: a class, and where in which YouTube video it is seen (in seconds)."""

    class_name: str
    youtube_id: str
    start: int
    end: int
    split: str

    @property
    def stem(self) -> str:
        """The usual name of the trimmed video, without its suffix."""
        return f"{self.youtube_id}_{self.start:06d}_{self.end:06d}"


def kinetics(
    *,
    root: str,
    train: str | None,
    test: str | None,
    val: str | None = None,
    classes: str | None = None,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    strip_prefix: str | None = None,
    allow_missing: bool = True,
    name: str = "kinetics",
    prepare_hint: str = "",
) -> VideoSource:
    """The videos of official lists (`label,youtube_id,time_start,time_end,split`) that are found under `root`.

    - A video is `<id>_<start>_<end>.mp4`, both times with six digits, or `<id>.mp4`, or has another video's suffix.
      It lies in the folder of its split (`train`; `val` or `validate`), or in `root` where there is no such folder;
      there, in a class folder of any spelling, or directly. It must be trimmed: the times are not looked at again.
    - Videos vanish from the web, so those that are not there are left out, and named in `VideoSource.missing`.
    - The classes are `class_names`, or the lines of the file `classes`, or the sorted names of the training list (of
      the test list without one); there must be `num_classes` of them.
    - Lists of paths, such as PySlowFast's `CLASS/ID.mp4 LABEL`, are read as by `atfr.data.datasets.videolist`, and `strip_prefix`
      is as there. A path that does not exist stands for the video of that id, which is looked for in the same way.

    Raises FileNotFoundError for what is not there and ValueError for a list that cannot be understood.
    """
    root = open_root(root, name=name, hint=prepare_hint)
    files = find_lists({"train": train, "val": val, "test": test}, root=root, name=name, hint=prepare_hint)
    if class_names is None and classes is not None:
        class_names = read_classes(find_file(classes, root=root, what="list of classes", name=name, hint=prepare_hint))
    common = {"root": root, "class_names": class_names, "num_classes": num_classes, "allow_missing": allow_missing, "name": name}
    if not any(is_official(file) for file in files.values()):
        return _from_paths(files, **common, strip_prefix=strip_prefix, hint=prepare_hint)
    if strip_prefix is not None:
        raise ValueError(f"dataset.strip_prefix={strip_prefix} is for lists of paths; {next(iter(files.values()))} has YouTube ids")
    return from_segments({split: read_segments(file) for split, file in files.items()}, files=files, **common, hint=prepare_hint)


def _from_paths(
    files: Mapping[str, str],
    *,
    root: str,
    class_names: Sequence[str] | None,
    num_classes: int | None,
    allow_missing: bool,
    name: str,
    strip_prefix: str | None,
    hint: str,
) -> VideoSource:
    """The videos of lists of paths."""
    lists = read_path_lists(files, root=root, num_classes=num_classes, class_names=class_names, strip_prefix=strip_prefix, name=name)
    return video_source(
        name=name,
        root=root,
        files=files,
        videos={split: locate_paths(videos, root, split, existing=lists.existing) for split, videos in lists.videos.items()},
        class_names=lists.labels.class_names,
        allow_missing=allow_missing,
        hint=hint,
        lines=lists.lines,
        numbered=lists.labels.numbered,
        existing=lists.existing,
    )


def from_segments(
    segments: Mapping[str, Sequence[Segment]],
    *,
    files: Mapping[str, str],
    root: str,
    class_names: Sequence[str] | None,
    num_classes: int | None,
    allow_missing: bool,
    name: str,
    hint: str,
    notes: Mapping[str, Any] | None = None,
) -> VideoSource:
    """The videos of the segments of each split, looked for under `root`."""
    first = "train" if "train" in segments else next(iter(segments))
    if class_names is None:
        class_names = sorted({segment.class_name for segment in segments[first]})
    check_classes(class_names, num_classes, where=f"dataset {name}")
    videos = {
        split: labelled(locate(listed, root), videos=root, classes=class_names, file=files[split]) for split, listed in segments.items()
    }
    return video_source(
        name=name, root=root, files=files, videos=videos, class_names=class_names, allow_missing=allow_missing, hint=hint, notes=notes
    )


def is_official(file: str) -> bool:
    """Whether a file has the official header."""
    lines = read_lines(file)
    return bool(lines) and "youtube_id" in lines[0][1]


def read_segments(file: str) -> list[Segment]:
    """The rows of an official list; further columns are ignored.

    Raises ValueError for a list without labels, as those of the test sets are, and for one that is no such list.
    """
    with io.StringIO(read_text(file), newline="") as stream:
        rows = csv.DictReader(stream)
        lacking = [column for column in _COLUMNS if column not in (rows.fieldnames or ())]
        if lacking == ["label"]:
            raise ValueError(f"{file}: the list has no labels (the test sets were published without); test on the validation list")
        if lacking:
            raise ValueError(f"{file}: the header lacks {lacking[0]}; the official lists begin with {','.join(_COLUMNS)}")
        segments = []
        for row in rows:
            try:
                start, end = int(float(row["time_start"])), int(float(row["time_end"]))
            except (TypeError, ValueError):
                raise ValueError(f"{file}:{rows.line_num}: time_start and time_end must be seconds, found {list(row.values())}") from None
            if not row["label"] or not row["youtube_id"]:
                raise ValueError(f"{file}:{rows.line_num}: the {'youtube_id' if row['label'] else 'label'} is missing")
            segments.append(Segment(row["label"], row["youtube_id"], start, end, row["split"]))
    if not segments:
        raise ValueError(f"{file}: the list is empty (it has only a header)")
    return segments


def read_classes(file: str) -> list[str]:
    """A list of classes, a name a line; underscores stand for blanks, as in the names of folders."""
    return [line.strip('"').replace("_", " ") for _, line in read_lines(file)]


def locate(segments: Sequence[Segment], root: str) -> list[Annotation]:
    """Where each segment's video lies under `root`, or would be expected to."""
    folders = {split: _split_folder(root, split) for split in {segment.split for segment in segments}}
    there = {folder: VideoIndex(os.path.join(root, folder)) for folder in set(folders.values())}
    # Two segments of one YouTube video cannot both be the file that is named by its id alone.
    once = _once(segment.youtube_id for segment in segments)

    def path(segment: Segment) -> str:
        folder = folders[segment.split]
        names = [segment.stem, segment.youtube_id] if segment.youtube_id in once else [segment.stem]
        found = next(filter(None, (there[folder].find(name, segment.class_name) for name in names)), None)
        return os.path.join(folder, found or os.path.join(segment.class_name, f"{segment.stem}.mp4"))

    return [Annotation(path(segment), segment.class_name) for segment in segments]


def locate_paths(videos: Sequence[Video], root: str, split: str, *, existing: ExistingFiles) -> tuple[Video, ...]:
    """Resolve listed paths `CLASS/ID.mp4`: search for missing files by id.

    They are looked for in the folder of class folders that the path names, and those under `root` in the folder of their
    split, too. A path that is not found stays as it is.
    """
    gone = {video.path for video in videos if video.path not in existing}
    if not gone:
        return tuple(videos)
    indices: dict[str, VideoIndex] = {}
    once = _once(youtube_id(stem(path)) for path in {video.path for video in videos})
    own = os.path.normpath(os.path.join(root, _split_folder(root, "train" if split == "train" else "val")))

    def found(path: str) -> str:
        folder, name = os.path.dirname(path), stem(path)
        video_id, class_name = youtube_id(name), os.path.basename(folder)
        top = os.path.dirname(folder)
        tops = [top, own]
        if os.path.relpath(path, root).startswith("../"):
            tops = [top]
        # In root itself the folders of other splits would be taken for those of classes.
        elif top in (root, os.path.dirname(root)):
            tops = [own]
        for top in tops:
            index = indices[top] = indices.get(top) or VideoIndex(top)
            found = index.find(name, class_name)
            if found is None and video_id in once:
                found = index.find_part(video_id, class_name) if name == video_id else index.find(video_id, class_name)
            if found is not None:
                return os.path.join(top, found)
        return path

    return tuple(replace(video, path=found(video.path)) if video.path in gone else video for video in videos)


def _once(ids: Iterable[str]) -> set[str]:
    return {video_id for video_id, count in Counter(ids).items() if count == 1}


def _split_folder(root: str, split: str) -> str:
    """The folder of a split under `root`; "" where everything lies together."""
    return next((folder for folder in _FOLDERS.get(split, (split,)) if os.path.isdir(os.path.join(root, folder))), "")
