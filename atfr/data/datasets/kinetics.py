"""Read Kinetics-400 and -600 (Kay et al., 2017; Carreira et al., 2018) from their official lists, or from PySlowFast's."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from atfr.data.datasets.videolist import path_source
from atfr.data.lists.annotations import Annotation, check_classes, find_file, find_lists, open_root, read_lines, to_videos, video_source
from atfr.data.lists.existing import ExistingFiles, stem
from atfr.data.lists.text import read_text
from atfr.data.lists.video_index import VideoIndex, youtube_id
from atfr.data.types import Video, VideoSource

_COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split")
# Possible folder names of a split, by its name in the lists.
_FOLDERS = {split: ("val", "validate", "validation") for split in ("val", "validate", "validation")}


@dataclass(frozen=True)
class Segment:
    """A row of an official list: a class, a YouTube video, and start and end in seconds."""

    class_name: str
    youtube_id: str
    start: int
    end: int
    split: str

    @property
    def stem(self) -> str:
        """Usual name of the trimmed video, without suffix."""
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
    """Read official lists (`label,youtube_id,time_start,time_end,split`) and find their trimmed videos under `root`.

    - A video is `<id>_<start>_<end>.mp4`, both times with six digits, or `<id>.mp4`; other video suffixes are possible.
      It is in the folder of its split (`train`; `val` or `validate`), or in `root` if there is no such folder; in a class
      folder of any spelling, or directly.
    - Videos disappear from the web, so missing ones are left out and go to `VideoSource.missing`.
    - The classes are `class_names`, the lines of the file `classes`, or the sorted names of the training list (without
      one, of the test list). There must be `num_classes` of them.
    - Lists of paths, such as PySlowFast's `CLASS/ID.mp4 LABEL`, are read as by `videolist`, with its `strip_prefix`. If a
      path does not exist, the video with its id is searched as above.

    Raises:
        FileNotFoundError: the root or a list is missing, or all videos of a list are.
        ValueError: a list cannot be read.
    """
    root = open_root(root, name=name, hint=prepare_hint)
    files = find_lists({"train": train, "val": val, "test": test}, root=root, name=name, hint=prepare_hint)
    if class_names is None and classes is not None:
        class_names = read_classes(find_file(classes, root=root, what="list of classes", name=name, hint=prepare_hint))
    common: dict[str, Any] = {"root": root, "class_names": class_names, "num_classes": num_classes, "allow_missing": allow_missing, "name": name}
    if not any(is_official(file) for file in files.values()):
        return path_source(files, **common, strip_prefix=strip_prefix, hint=prepare_hint, locate=partial(locate_paths, root))[0]
    if strip_prefix is not None:
        raise ValueError(f"dataset.strip_prefix={strip_prefix} is for lists of paths; {next(iter(files.values()))} has YouTube ids")
    return from_segments({split: read_segments(file) for split, file in files.items()}, files=files, **common, hint=prepare_hint)


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
    """Build the dataset from the segments of each split."""
    first = "train" if "train" in segments else next(iter(segments))
    if class_names is None:
        class_names = sorted({segment.class_name for segment in segments[first]})
    check_classes(class_names, num_classes, where=f"dataset {name}")
    videos = {
        split: to_videos(locate(listed, root), videos=root, classes=class_names, file=files[split]) for split, listed in segments.items()
    }
    return video_source(
        name=name, root=root, files=files, videos=videos, class_names=class_names, allow_missing=allow_missing, hint=hint, notes=notes
    )


def is_official(file: str) -> bool:
    """Return whether a list has the official header."""
    lines = read_lines(file)
    return bool(lines) and "youtube_id" in lines[0][1]


def read_segments(file: str) -> list[Segment]:
    """Read the rows of an official list; other columns are ignored.

    Raises:
        ValueError: the list has no labels (as those of the test sets), or is not an official list.
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
    """Read a list of classes, one name per line; underscores become blanks, as in folder names."""
    return [line.strip('"').replace("_", " ") for _, line in read_lines(file)]


def locate(segments: Sequence[Segment], root: str) -> list[Annotation]:
    """Find the video of each segment under `root`; a missing one gets its usual path."""
    folders = {split: _split_folder(root, split) for split in {segment.split for segment in segments}}
    indices = {folder: VideoIndex(os.path.join(root, folder)) for folder in set(folders.values())}
    # A file named by the id alone is ambiguous if the video has two segments.
    unique = _unique_ids(segment.youtube_id for segment in segments)

    def path(segment: Segment) -> str:
        folder = folders[segment.split]
        names = [segment.stem, segment.youtube_id] if segment.youtube_id in unique else [segment.stem]
        found = next(filter(None, (indices[folder].find(name, segment.class_name) for name in names)), None)
        return os.path.join(folder, found or os.path.join(segment.class_name, f"{segment.stem}.mp4"))

    return [Annotation(path(segment), segment.class_name) for segment in segments]


def locate_paths(root: str, videos: Sequence[Video], split: str, existing: ExistingFiles) -> tuple[Video, ...]:
    """Replace listed paths `CLASS/ID.mp4` that do not exist by the video with the same id.

    Searches the parent of the class folder in the path and, for paths under `root`, the folder of the split. A path
    without such a video is not changed.
    """
    gone = {video.path for video in videos if video.path not in existing}
    if not gone:
        return tuple(videos)
    indices: dict[str, VideoIndex] = {}
    unique = _unique_ids(youtube_id(stem(path)) for path in {video.path for video in videos})
    split_folder = os.path.normpath(os.path.join(root, _split_folder(root, "train" if split == "train" else "val")))

    def found(path: str) -> str:
        folder, name = os.path.dirname(path), stem(path)
        video_id, class_name = youtube_id(name), os.path.basename(folder)
        top = os.path.dirname(folder)
        tops = [top, split_folder]
        if os.path.relpath(path, root).startswith("../"):
            tops = [top]
        # In `root`, the folders of other splits would be mistaken for class folders.
        elif top in (root, os.path.dirname(root)):
            tops = [split_folder]
        for top in tops:
            index = indices[top] = indices.get(top) or VideoIndex(top)
            found = index.find(name, class_name)
            if found is None and video_id in unique:
                found = index.find_part(video_id, class_name) if name == video_id else index.find(video_id, class_name)
            if found is not None:
                return os.path.join(top, found)
        return path

    return tuple(replace(video, path=found(video.path)) if video.path in gone else video for video in videos)


def _unique_ids(ids: Iterable[str]) -> set[str]:
    return {video_id for video_id, count in Counter(ids).items() if count == 1}


def _split_folder(root: str, split: str) -> str:
    """Return the folder of a split under `root`; "" if there is none."""
    return next((folder for folder in _FOLDERS.get(split, (split,)) if os.path.isdir(os.path.join(root, folder))), "")
