"""Read UCF101 (Soomro et al., 2012) from its official files: classInd.txt, trainlist0N.txt and testlist0N.txt."""

from __future__ import annotations

import os
from collections.abc import Sequence

from atfr.data.lists.annotations import Annotation, check_classes, find_file, open_split, read_lines, to_videos, under, video_source
from atfr.data.types import VideoSource


def ucf101(
    *,
    root: str,
    split: int,
    videos: str = "UCF-101",
    annotations: str = "ucfTrainTestlist",
    num_classes: int | None = 101,
    allow_missing: bool = False,
    name: str = "ucf101",
    prepare_hint: str = "",
) -> VideoSource:
    """Read one of the three official splits; its test videos are also the validation videos.

    `videos` (class folders) and `annotations` (the lists) are folders, relative to `root` or absolute.

    Raises:
        FileNotFoundError: a folder, list or video is missing.
        ValueError: a list cannot be read.
    """
    root = open_split(root, split, name=name, hint=prepare_hint)
    files = {
        part: find_file(os.path.join(under(root, annotations), file), root=root, what=f"{part} list", name=name, hint=prepare_hint)
        for part, file in (("classes", "classInd.txt"), ("train", f"trainlist0{split}.txt"), ("test", f"testlist0{split}.txt"))
    }
    classes = read_classes(files["classes"])
    check_classes(classes, num_classes, where=files["classes"])
    folder = under(root, videos)
    return video_source(
        name=name,
        root=root,
        files=files,
        videos={part: to_videos(read_list(files[part], classes), videos=folder, classes=classes, file=files[part]) for part in ("train", "test")},
        class_names=classes,
        allow_missing=allow_missing,
        hint=prepare_hint,
        notes={"official_split": split},
    )


def read_classes(file: str) -> tuple[str, ...]:
    """Read classInd.txt: lines `1 ApplyEyeMakeup`, numbered from 1 without gaps."""
    classes: list[str] = []
    for number, line in read_lines(file):
        index, _, class_name = line.partition(" ")
        if index != str(len(classes) + 1) or not class_name:
            raise ValueError(f"{file}:{number}: expected '{len(classes) + 1} CLASS', found {line!r}")
        classes.append(class_name.strip())
    return tuple(classes)


def read_list(file: str, classes: Sequence[str]) -> list[Annotation]:
    """Read a train list, with lines `Class/video.avi 1`, or a test list, which has no numbers."""
    numbers = {class_name: str(index) for index, class_name in enumerate(classes, start=1)}
    videos = []
    for number, line in read_lines(file):
        path, _, label = line.partition(" ")
        class_name = path.partition("/")[0]
        if "/" not in path:
            raise ValueError(f"{file}:{number}: expected 'Class/video.avi' or 'Class/video.avi 1', found {line!r}")
        if label and label.strip() != numbers.get(class_name):
            raise ValueError(f"{file}:{number}: the number {label.strip()} is not that of class {class_name} in classInd.txt")
        videos.append(Annotation(path, class_name))
    return videos
