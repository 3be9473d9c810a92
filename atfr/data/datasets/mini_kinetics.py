"""Read mini-Kinetics: 200 classes of Kinetics-400. Several versions exist, so the protocol records the selection."""

from __future__ import annotations

from collections.abc import Sequence

from atfr.data.datasets.kinetics import Segment, from_segments, read_classes, read_segments
from atfr.data.lists.annotations import find_file, find_lists, open_root, read_lines
from atfr.data.types import VideoSource


def mini_kinetics(
    *,
    root: str,
    train: str | None,
    test: str | None,
    subset: str | Sequence[str] | None,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = 200,
    allow_missing: bool = True,
    name: str = "mini_kinetics",
    prepare_hint: str = "",
) -> VideoSource:
    """Select a part of Kinetics-400, whose official lists are `train` and `test`.

    `subset` is one of

    - two files [training, test] with one YouTube id per line, as published by Xie et al. (2018): these videos;
    - one file with one class per line: all videos of these classes;
    - None: all videos of `train` and `test`, which list only the part.

    The protocol records the selection, its files and the number of ids that are not in the official lists. Everything
    else is as in `kinetics`.
    """
    root = open_root(root, name=name, hint=prepare_hint)

    def find(file: str, what: str) -> str:
        return find_file(file, root=root, what=what, name=name, hint=prepare_hint)

    files = find_lists({"train": train, "test": test}, root=root, name=name, hint=prepare_hint)
    segments = {split: read_segments(file) for split, file in files.items()}
    if subset is None:
        chosen: dict[str, object] = {"by": "the lists themselves"}
    elif isinstance(subset, str):
        file = find(subset, "list of classes")
        listed_classes = read_classes(file)
        class_names = class_names or listed_classes
        classes = set(listed_classes)
        segments = {split: [segment for segment in listed if segment.class_name in classes] for split, listed in segments.items()}
        chosen = {"by": "classes", "files": [file]}
    else:
        if len(subset) != 2:
            raise ValueError(f"dataset.subset={list(subset)} must be two files of ids, [training, test], or one file of classes")
        ids = {split: find(file, f"{split} list of ids") for split, file in zip(("train", "test"), subset) if split in files}
        not_listed = {}
        for split, file in ids.items():
            segments[split], not_listed[split] = _with_ids(segments[split], file)
        chosen = {"by": "videos", "files": list(ids.values()), "not_in_kinetics": not_listed}
    for split, listed in segments.items():
        if not listed:
            raise ValueError(f"dataset {name}: {files[split]} has none of the videos that dataset.subset={subset} names")
    return from_segments(
        segments,
        files=files,
        root=root,
        class_names=class_names,
        num_classes=num_classes,
        allow_missing=allow_missing,
        name=name,
        hint=prepare_hint,
        notes={"subset": chosen},
    )


def _with_ids(segments: Sequence[Segment], file: str) -> tuple[list[Segment], int]:
    """Return the segments whose YouTube ids are in a file, and the number of ids without one."""
    ids = {line for _, line in read_lines(file)}
    return [segment for segment in segments if segment.youtube_id in ids], len(ids - {segment.youtube_id for segment in segments})
