"""Read Something-Something V2 (Goyal et al., 2017) from its official files: labels.json, train.json, validation.json."""

from __future__ import annotations

import json
from typing import Any

from atfr.data.lists.annotations import Annotation, check_classes, find_file, find_lists, open_root, read_lines, to_videos, under, video_source
from atfr.data.lists.text import read_text
from atfr.data.types import VideoSource


def something_something_v2(
    *,
    root: str,
    labels: str,
    train: str | None,
    test: str | None,
    val: str | None = None,
    videos: str = "20bn-something-something-v2",
    suffix: str = ".webm",
    num_classes: int | None = 174,
    allow_missing: bool = False,
    name: str = "something_something_v2",
    prepare_hint: str = "",
) -> VideoSource:
    """Read the lists; their videos are `videos`/ID`suffix`, where `videos` is a folder relative to `root` or absolute.

    The published test.json has no classes, so `test` is validation.json, as in the literature, or test-answers.csv, which
    was published later.

    Raises:
        FileNotFoundError: the root, a list or a video is missing.
        ValueError: a file cannot be read.
    """
    root = open_root(root, name=name, hint=prepare_hint)
    files = find_lists({"train": train, "val": val, "test": test}, root=root, name=name, hint=prepare_hint)
    labels = find_file(labels, root=root, what="file of labels", name=name, hint=prepare_hint)
    classes = read_classes(labels)
    check_classes(classes, num_classes, where=labels)
    folder = under(root, videos)
    return video_source(
        name=name,
        root=root,
        files=files,
        videos={split: to_videos(read_list(file, suffix), videos=folder, classes=classes, file=file) for split, file in files.items()},
        class_names=classes,
        allow_missing=allow_missing,
        hint=prepare_hint,
    )


def read_classes(file: str) -> tuple[str, ...]:
    """Read the classes of labels.json, {"Closing something": "5", ...}, in the order of their ids."""
    labels = _load(file)
    if isinstance(labels, dict) and labels and all(isinstance(number, int) for number in labels.values()):
        raise ValueError(f'{file}: ids are numbers, as in Something-Else; the official labels.json has strings ("5")')
    if not isinstance(labels, dict) or sorted(labels.values(), key=str) != sorted(map(str, range(len(labels)))):
        raise ValueError(f'{file}: expected {{"CLASS": "ID", ...}} with ids from "0", as in the official labels.json')
    return tuple(sorted(labels, key=lambda class_name: int(labels[class_name])))


def read_list(file: str, suffix: str = ".webm") -> list[Annotation]:
    """Read train.json, validation.json or test-answers.csv. The class is the template without brackets."""
    entries = _answers(file) if file.endswith(".csv") else _load(file)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "id" in entry for entry in entries):
        raise ValueError(f'{file}: expected [{{"id": ..., "template": ...}}, ...], as in the official lists')
    for entry in entries:
        template = entry.get("template")
        if template is not None and not isinstance(template, str):
            raise ValueError(f"{file}: the template of video {entry['id']} is not text: {template!r}")
        if template is None:
            raise ValueError(f"{file}: video {entry['id']} has no template: the test list was published without labels; test on validation.json or test-answers.csv")
    return [Annotation(f"{entry['id']}{suffix}", entry["template"].replace("[", "").replace("]", "")) for entry in entries]


def _answers(file: str) -> list[dict[str, str]]:
    """Read test-answers.csv, with lines `ID;TEMPLATE`."""
    entries = []
    for number, line in read_lines(file):
        video, _, template = line.partition(";")
        if not video.isdigit() or not template:
            raise ValueError(f"{file}:{number}: expected 'ID;TEMPLATE' as in the official test-answers.csv, found {line!r}")
        entries.append({"id": video, "template": template})
    return entries


def _load(file: str) -> Any:
    text = read_text(file)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file}: not a JSON file ({error})") from error
