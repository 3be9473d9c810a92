"""Count the classes and videos in the official lists of the datasets, and compare them with the published counts.

    python scripts/annotation_counts.py --annotations DIR [--output docs/annotations.md]

DIR has a folder for each dataset: kinetics400, kinetics600 (train.csv and val.csv, or kinetics-400_val.csv ...),
mini_kinetics200 (train_ytid_list.txt, val_ytid_list.txt, and kinetics_200_val.csv for the classes),
something_something_v2 (labels.json, train.json or train_excerpt.json, validation.json, test-answers.csv), ucf101 and
hmdb51 (their lists). Missing lists get a dash. --output replaces the table between the marks in a file.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from atfr.data.datasets import hmdb51, something_something, ucf101
from atfr.data.datasets.kinetics import read_segments
from atfr.data.lists.annotations import OFFICIAL_SPLITS, read_lines

TESTED = "Something-Something V2, official test"
START, END = "<!-- table -->", "<!-- end of table -->"


@dataclass(frozen=True)
class Counts:
    """Counted or published numbers of a dataset; None if unknown."""

    classes: int | None = None
    train: int | None = None
    test: int | None = None


@dataclass(frozen=True)
class Lists:
    """The video names in each list of a dataset; None if there is no such list."""

    classes: int | None = None
    train: list[str] | None = None
    test: list[str] | None = None
    excerpt: bool = False  # the training list is incomplete
    twice: int = 0  # YouTube ids that a list has more than once, with different times


# Kinetics-600: Carreira et al., 2018, 50 validation clips per class. mini-Kinetics: Xie et al., 2018. Others: the web pages
# of the datasets. For Kinetics-400, only the number of classes is published.
PUBLISHED = {
    "Kinetics-400": Counts(400),
    "Kinetics-600": Counts(600, None, 30_000),
    "mini-Kinetics-200": Counts(200, 80_000, 5_000),
    "Something-Something V2": Counts(174, 168_913, 24_777),
    TESTED: Counts(174, 168_913, 27_157),
    "UCF101 split 1": Counts(101, 9_537, 3_783),
    "UCF101 split 2": Counts(101, 9_586, 3_734),
    "UCF101 split 3": Counts(101, 9_624, 3_696),
    **{f"HMDB51 split {split}": Counts(51, 3_570, 1_530) for split in OFFICIAL_SPLITS},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path, required=True, metavar="DIR")
    parser.add_argument("--output", type=Path, help="file with the two marks; the table between them is replaced")
    arguments = parser.parse_args()
    try:
        datasets = dict(read_datasets(arguments.annotations))
        if all(lists.train is None and lists.test is None for lists in datasets.values()):
            raise ValueError(f"{arguments.annotations} holds the lists of none of {', '.join(PUBLISHED)}")
        lines = table(datasets)
    except (ValueError, OSError) as error:
        sys.exit(f"annotation_counts: {error}")
    print("\n".join(lines))
    if arguments.output:
        text = arguments.output.read_text(encoding="utf-8")
        before, after = text.split(START)[0], text.split(END)[1]
        arguments.output.write_text(f"{before}{START}\n" + "\n".join(lines) + f"\n{END}{after}", encoding="utf-8")


def table(datasets: dict[str, Lists]) -> list[str]:
    """Format a Markdown table with a row per dataset and split."""
    lines = ["| | classes | training videos | test videos | in both | twice | as published |", "|---|---|---|---|---|---|---|"]
    for name, published in PUBLISHED.items():
        there = datasets.get(name, Lists())
        counted = Counts(there.classes, *(None if videos is None else len(videos) for videos in (there.train, there.test)))
        both = "–" if there.train is None or there.test is None else f"{len(set(there.train) & set(there.test)):,}"
        cells = [shown(counted.classes), shown(counted.train) + (" (an excerpt)" if there.excerpt else ""), shown(counted.test), both]
        twice = there.twice + sum(repeated(videos) for videos in (there.train, there.test) if videos)
        cells.append(f"{twice:,}" if there.train or there.test else "–")
        lines.append(f"| {name} | {' | '.join(cells)} | {verdict(counted, published, excerpt=there.excerpt)} |")
    return lines


def verdict(counted: Counts, published: Counts, *, excerpt: bool) -> str:
    """Say which counts agree with the published ones, and which differ."""
    same, different = [], []
    for name in ("classes", "train", "test"):
        found, expected = getattr(counted, name), getattr(published, name)
        if found is None or expected is None or (name == "train" and excerpt):
            continue
        (same if found == expected else different).append(name if found == expected else f"{name}: {expected:,} published")
    return "; ".join([f"yes: {', '.join(same)}"] * bool(same) + [f"NO: {', '.join(different)}"] * bool(different)) or "–"


def shown(count: int | None) -> str:
    return "–" if count is None else f"{count:,}"


def read_datasets(folder: Path) -> Iterator[tuple[str, Lists]]:
    """Yield the lists of each dataset, by the names of PUBLISHED."""
    for number in (400, 600):
        yield f"Kinetics-{number}", kinetics(folder / f"kinetics{number}", number)
    yield "mini-Kinetics-200", mini_kinetics(folder / "mini_kinetics200")
    if (folder / "something_something_v2").is_dir():
        yield "Something-Something V2", something(folder / "something_something_v2", "validation.json")
        yield TESTED, something(folder / "something_something_v2", "test-answers.csv")
    if (folder / "ucf101").is_dir():
        classes = ucf101.read_classes(str(folder / "ucf101/classInd.txt"))
        for split in OFFICIAL_SPLITS:
            lists = [[item.path for item in ucf101.read_list(str(folder / f"ucf101/{part}list0{split}.txt"), classes)] for part in ("train", "test")]
            yield f"UCF101 split {split}", Lists(len(classes), *lists)
    if (folder / "hmdb51").is_dir():
        for split in OFFICIAL_SPLITS:
            parts = hmdb51.read_split(str(folder / "hmdb51"), split)
            lists = [[item.path for item in parts[part]] for part in ("train", "test")]
            yield f"HMDB51 split {split}", Lists(len(hmdb51.read_classes(str(folder / "hmdb51"), split)), *lists)


def kinetics(folder: Path, number: int) -> Lists:
    """Read the lists of Kinetics. Names are YouTube id and times: a few ids have two segments of different classes."""
    segments = {}
    for split in ("train", "val"):
        file = first_of(folder / f"{split}.csv", folder / f"kinetics-{number}_{split}.csv")
        segments[split] = read_segments(str(file)) if file else None
    classes = {segment.class_name for listed in segments.values() for segment in listed or ()}
    names = {split: None if listed is None else [segment.stem for segment in listed] for split, listed in segments.items()}
    twice = sum(repeated([segment.youtube_id for segment in listed]) for listed in segments.values() if listed)
    return Lists(len(classes) or None, names["train"], names["val"], twice=twice)


def mini_kinetics(folder: Path) -> Lists:
    ids = {}
    for split in ("train", "val"):
        file = first_of(folder / f"{split}_ytid_list.txt")
        ids[split] = [line for _, line in read_lines(str(file))] if file else None
    rows = first_of(folder / "kinetics_200_val.csv")
    classes = len({segment.class_name for segment in read_segments(str(rows))}) if rows else None
    return Lists(classes, ids["train"], ids["val"])


def something(folder: Path, test: str) -> Lists:
    """Read the lists of Something-Something V2 with `test` as the test list; check all templates against labels.json."""
    classes = something_something.read_classes(str(folder / "labels.json"))
    lists = []
    train = first_of(folder / "train.json", folder / "train_excerpt.json")
    for file in (train, first_of(folder / test)):
        videos = something_something.read_list(str(file)) if file else []
        unknown = next((video for video in videos if video.class_name not in classes), None)
        if unknown is not None:
            raise ValueError(f"{file}: {unknown.class_name!r} of {unknown.path} is not in labels.json")
        lists.append([video.path for video in videos] if file else None)
    return Lists(len(classes), *lists, excerpt=train is not None and train.name != "train.json")


def repeated(names: list[str]) -> int:
    """Count the names that appear more than once."""
    return sum(count > 1 for count in Counter(names).values())


def first_of(*files: Path) -> Path | None:
    return next((file for file in files if file.is_file()), None)


if __name__ == "__main__":
    main()
