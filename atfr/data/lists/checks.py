"""Warn about lists that can be read but are probably wrong."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from atfr.data.lists.text import normalized_name, some
from atfr.data.types import Video

Lists = Mapping[str, Sequence[Video]]  # by split
Paths = Mapping[str, Sequence[str]]
Locate = Callable[[str, int], str]  # (split, index of a video) -> "file:line" in its list


def list_warnings(
    listed: Lists,
    there: Lists,
    *,
    files: Mapping[str, str],
    lines: Mapping[str, Sequence[int]],
    class_names: Sequence[str],
    numbered: bool,
    is_link: Callable[[str], bool],
) -> tuple[str, ...]:
    """Return one-line warnings about the `listed` videos of all splits and those of them that are `there` (exist).

    `lines` and `numbered` as in `video_source`. `is_link` tells whether a path is a symbolic link to an existing file.
    """
    paths = _one_path_a_file(listed, is_link)

    def locate(split: str, index: int) -> str:
        return f"{files[split]}:{lines[split][index]}" if split in lines else files[split]

    return (
        *_suspicious_classes(class_names, listed, files=files, numbered=numbered),
        *untrained_classes(class_names, there, files=files, numbered=numbered),
        *_repeated_videos(paths, locate),
        *_two_labels(paths, listed, locate, class_names),
        *_training_videos_in_test(paths, files),
    )


def _suspicious_classes(class_names: Sequence[str], listed: Lists, *, files: Mapping[str, str], numbered: bool) -> Iterator[str]:
    lists = " and ".join(dict.fromkeys(files[split] for split in listed))
    if len(class_names) == 1:
        yield f"{lists}: there is only one class, {class_names[0]!r}, so every prediction is right"
    counts = Counter(map(normalized_name, class_names))
    alike = [name for name in class_names if counts[normalized_name(name)] > 1]
    if alike:
        yield f"{lists}: classes differ only in case, blanks or underscores: {some(alike)}"
    if numbered:
        yield from _counting_from_one(listed, files)


def _counting_from_one(listed: Lists, files: Mapping[str, str]) -> Iterator[str]:
    labels = {split: [video.label for video in videos] for split, videos in listed.items()}
    ranges = {split: (min(own), max(own)) for split, own in labels.items()}
    if min(least for least, _ in ranges.values()) == 1:
        lists = " and ".join(dict.fromkeys(files[split] for split in ranges))
        yield f"{lists}: labels seem to count from 1: no video has label 0, which must be the first"
        return
    if "train" not in ranges:
        return
    least, largest = ranges["train"]
    for split, other in ranges.items():
        if (least, other) in ((1, (0, largest - 1)), (0, (1, largest + 1))):
            one, zero = (files["train"], files[split]) if least == 1 else (files[split], files["train"])
            yield f"labels seem to count from 1 in {one}, but from 0 in {zero}"


def untrained_classes(class_names: Sequence[str], there: Lists, *, files: Mapping[str, str], numbered: bool = False) -> Iterator[str]:
    """Warn about classes without training videos, and about test and val videos of these classes."""
    if "train" not in there:
        return
    trained = {video.label for video in there["train"]}
    untrained = [name for label, name in enumerate(class_names) if label not in trained]
    if not untrained:
        return
    have = "has" if len(untrained) == 1 else "have"
    numbers = f" (labels 0 to {len(class_names) - 1})" if numbered else ""
    yield f"{files['train']}: {len(untrained)} of the {len(class_names)} classes{numbers} {have} no training videos: {some(untrained)}"
    for split, videos in there.items():
        labels = [video.label for video in videos if video.label not in trained]
        if labels:
            names = some([class_names[label] for label in dict.fromkeys(labels)])
            yield f"{files[split]}: {len(labels)} of the {len(videos)} {split} videos are of classes without training videos: {names}"


def _repeated_videos(paths: Paths, locate: Locate) -> Iterator[str]:
    for split, own in paths.items():
        repeats = len(own) - len(set(own))
        if repeats:
            path, times = Counter(own).most_common(1)[0]
            yield f"{locate(split, own.index(path))}: {path} is listed {times} times (repeated rows of the {split} list: {repeats})"


def _two_labels(paths: Paths, listed: Lists, locate: Locate, class_names: Sequence[str]) -> Iterator[str]:
    labels: dict[str, int] = {}
    differing: dict[str, tuple[str, int]] = {}
    for split, videos in listed.items():
        for index, (path, video) in enumerate(zip(paths[split], videos)):
            if labels.setdefault(path, video.label) != video.label:
                differing.setdefault(path, (split, index))
    if differing:
        path, (split, index) = next(iter(differing.items()))
        first = next(locate(split, own.index(path)) for split, own in paths.items() if path in own)
        one, other = class_names[labels[path]], class_names[listed[split][index].label]
        count = "1 video has" if len(differing) == 1 else f"{len(differing)} videos have"
        yield f"{count} two labels: {path} is {one!r} in {first}, but {other!r} in {locate(split, index)}"


def _training_videos_in_test(paths: Paths, files: Mapping[str, str]) -> Iterator[str]:
    trained = set(paths.get("train", ()))
    for split in (split for split in paths if split != "train"):
        both = [path for path in paths[split] if path in trained]
        if both:
            yield f"{files[split]}: {len(both)} of the {len(paths[split])} {split} videos are also training videos: {some(both, shown=1)}"


def _one_path_a_file(listed: Lists, is_link: Callable[[str], bool]) -> Paths:
    """Replace the paths that lead to the same file by the one that is listed first."""
    folders: dict[str, str] = {}
    first: dict[str, str] = {}

    def unique(path: str) -> str:
        path = os.path.normpath(path) if "/." in path or "//" in path else path
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        target = os.path.realpath(path) if is_link(path) else f"{folders[folder]}/{name}"
        return first.setdefault(target, path)

    return {split: [unique(video.path) for video in videos] for split, videos in listed.items()}
