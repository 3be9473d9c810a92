"""Read HMDB51 (Kuehne et al., 2011) from its official files: `<class>_test_split<N>.txt` for each class and split."""

from __future__ import annotations

import os

from atfr.data.lists.annotations import Annotation, check_classes, hint_suffix, open_split, read_lines, to_videos, under, video_source
from atfr.data.types import VideoSource

_PARTS: dict[str, str | None] = {"0": None, "1": "train", "2": "test"}  # 0: not in this split


def hmdb51(
    *,
    root: str,
    split: int,
    videos: str = "videos",
    annotations: str = "testTrainMulti_7030_splits",
    num_classes: int | None = 51,
    allow_missing: bool = False,
    name: str = "hmdb51",
    prepare_hint: str = "",
) -> VideoSource:
    """Read one of the three official splits; its test videos are also the validation videos. Classes are sorted by name.

    `videos` (class folders) and `annotations` (the lists) are folders, relative to `root` or absolute.

    Raises:
        FileNotFoundError: a folder or video is missing.
        ValueError: a list cannot be read.
    """
    root = open_split(root, split, name=name, hint=prepare_hint)
    lists = under(root, annotations)
    if not os.path.isdir(lists):
        raise FileNotFoundError(f"dataset {name}: the folder of lists {lists} does not exist{hint_suffix(prepare_hint)}")
    classes = read_classes(lists, split)
    where = os.path.join(lists, f"*_test_split{split}.txt")
    check_classes(classes, num_classes, where=where)
    parts = read_split(lists, split)
    folder = under(root, videos)
    return video_source(
        name=name,
        root=root,
        files=dict.fromkeys(parts, where),
        videos={part: to_videos(listed, videos=folder, classes=classes, file=where) for part, listed in parts.items()},
        class_names=classes,
        allow_missing=allow_missing,
        hint=prepare_hint,
        notes={"official_split": split},
    )


def read_classes(folder: str, split: int) -> tuple[str, ...]:
    """List the classes that have a list for this split, sorted by name."""
    ending = f"_test_split{split}.txt"
    # Sorted without the ending; with it, climb_stairs would come before climb.
    return tuple(sorted(file.removesuffix(ending) for file in os.listdir(folder) if file.endswith(ending)))


def read_split(folder: str, split: int) -> dict[str, list[Annotation]]:
    """Read the train and test videos of a split."""
    parts: dict[str, list[Annotation]] = {"train": [], "test": []}
    for class_name in read_classes(folder, split):
        file = os.path.join(folder, f"{class_name}_test_split{split}.txt")
        for number, line in read_lines(file):
            video, _, part = line.rpartition(" ")
            if part not in _PARTS or not video:
                raise ValueError(f"{file}:{number}: expected 'VIDEO 0', 'VIDEO 1' or 'VIDEO 2', found {line!r}")
            chosen = _PARTS[part]
            if chosen is not None:
                parts[chosen].append(Annotation(f"{class_name}/{video.strip()}", class_name))
    return parts
