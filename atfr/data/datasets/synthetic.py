"""The built-in dataset `synthetic`: the scenes of `synthetic_scene.py`, written once as H.264 files.

    root/dataset.json                 format version and all parameters; written last
    root/train.csv, root/test.csv     path,label: paths relative to root, class names
    root/truth.csv                    ground truth of each video: phase starts, busyness, amount of change and of distractors
    root/<split>/<class>/<id>.mp4     H.264, yuv420p

Video i of a split depends only on (seed, split, i) and the parameters of the scene, not on the number of worker
processes or on interruptions.
"""

from __future__ import annotations

import csv
import json
import operator
import os
import shlex
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from atfr.data.datasets.synthetic_scene import CLASSES, DWELLS, PHASES, SPLITS, Timeline, Truth, check_scene, render
from atfr.data.datasets.videolist import videolist
from atfr.data.types import VideoSource
from atfr.data.video.encode import h264_file
from atfr.data.workers import Heartbeat, cores, run_each
from atfr.utils.atomic_io import atomic_write
from atfr.utils.paths import expanded
from atfr.utils.progress import watched

__all__ = ["CLASSES", "DWELLS", "PHASES", "SPLITS", "Timeline", "Truth", "generate", "render", "synthetic", "write_video"]

VERSION = 1  # increase it with every change to scenes or encoding; older folders are then refused
FPS = 16
SIZE, FRAMES = 56, 36  # height and width in pixels, frames per video
MARKER = "dataset.json"
UNFINISHED = "unfinished.json"  # replaces the marker while files are written
TRUTH_COLUMNS = ("path", "label", "phase_starts", "end", "busyness", "change", "changed_steps", "distractors")

_KEYFRAME_EVERY = 12  # frames: a seek decodes at most this many unused frames


@dataclass(frozen=True)
class _Spec:
    """All parameters that the files depend on."""

    version: int
    seed: int
    train: int
    test: int
    size: int
    frames: int
    dwell: str
    distractors: bool = False


class NotGenerated(ValueError):
    """The built-in dataset does not exist, and must not be generated."""


_Job = tuple[Path, _Spec, str, int]  # root, parameters, split, number of the video


def synthetic(*, root: str, seed: int, train: int, test: int, dwell: str, num_classes: int, distractors: bool = False, make: bool | None = None) -> VideoSource:
    """Read the built-in dataset; generate it in `root` first if it does not exist.

    Raises:
        NotGenerated: it does not exist, and `make` is False.
    """
    if num_classes != len(CLASSES):
        raise ValueError(f"dataset.num_classes is {num_classes}, but dataset synthetic always has {len(CLASSES)} classes")
    root = expanded(root, "dataset.root")
    if make is not False:
        generate(root, seed=seed, train=train, test=test, dwell=dwell, distractors=distractors)
    elif not _is_complete(Path(root), _checked_spec(seed=seed, train=train, test=test, size=SIZE, frames=FRAMES, dwell=dwell, distractors=distractors)):
        options = shlex.join([root, "--seed", str(seed), "--train", str(train), "--test", str(test), "--dwell", dwell, *(["--distractors"] if distractors else [])])
        raise NotGenerated(
            f"dataset synthetic is not in {os.path.abspath(root)}: set dataset.root to the folder that has it,"
            f" or make it with python scripts/make_synthetic.py {options}"
        )
    train_list, test_list = (os.path.join(root, f"{split}.csv") for split in SPLITS)
    source = videolist(root=root, train=train_list, test=test_list, class_names=CLASSES, name="synthetic")
    return replace(source, notes={**source.notes, "seed": seed, "dwell": dwell, "distractors": distractors, "version": VERSION})


def generate(
    root: Path | str,
    *,
    seed: int = 0,
    train: int = 2000,
    test: int = 400,
    size: int = SIZE,
    frames: int = FRAMES,
    dwell: str = "uneven",
    distractors: bool = False,
    workers: int | None = None,
) -> None:
    """Write the dataset to `root`, unless it exists. A killed run continues where it stopped.

    Args:
        train, test: number of videos; the numbers per class differ by at most one.
        size: height and width in pixels.
        frames: length of a video; each window of 31 frames (a clip of 16 at stride 2) shows all phases.
        dwell: how long the phases last: "uneven" (one often lasts most of the clip), "even", or "brief" (as uneven, but
            a short phase is a single frame of such a clip).
        distractors: whether most of what changes means nothing (see `synthetic_distractors`).
        workers: number of processes; None: one per CPU core; 1: the calling process.

    Raises:
        ValueError: an argument is out of range, or `root` has a dataset with other parameters.
    """
    spec = _checked_spec(seed=seed, train=train, test=test, size=size, frames=frames, dwell=dwell, distractors=distractors)
    workers = cores() if workers is None else _integer("workers", workers, least=1)
    root = Path(expanded(str(root)))
    if _is_complete(root, spec):
        return

    root.mkdir(parents=True, exist_ok=True)
    _write_atomically(root / UNFINISHED, json.dumps(asdict(spec), indent=1) + "\n")
    for split in SPLITS:
        for name in CLASSES:
            (root / split / name).mkdir(parents=True, exist_ok=True)
    jobs = [(root, spec, split, index) for split in SPLITS for index in range(getattr(spec, split))]
    made = dict(watched(_run(jobs, workers), f"synthetic -> {root}", unit="video", total=len(jobs), leave=True))
    rows = [made[job] for job in jobs]
    for split in SPLITS:
        listed = [row[:2] for row in rows if row[0].startswith(f"{split}/")]
        _write_csv(root / f"{split}.csv", ("path", "label"), listed)
    _write_csv(root / "truth.csv", TRUTH_COLUMNS, rows)
    _write_atomically(root / MARKER, json.dumps(asdict(spec), indent=1) + "\n")
    (root / UNFINISHED).unlink(missing_ok=True)


def write_video(path: Path, pixels: np.ndarray) -> None:
    """Encode uint8 RGB frames [T, H, W, 3] (H and W even) as H.264. The file is written atomically."""
    with h264_file(path, rate=FPS, keyframe=_KEYFRAME_EVERY) as add:
        for frame in pixels:
            add(frame)


def _make(job: _Job, heartbeat: Heartbeat | None = None) -> tuple[str, ...]:
    """Write a video unless it exists; return its row of truth.csv."""
    root, spec, split, index = job
    # Always rendered, which is quick: truth.csv needs the ground truth.
    pixels, label, truth = render(
        index, seed=spec.seed, split=split, size=spec.size, frames=spec.frames, dwell=spec.dwell, distractors=spec.distractors
    )
    relative = f"{split}/{CLASSES[label]}/{index:05d}.mp4"
    if not (root / relative).exists():
        write_video(root / relative, pixels)
    starts = " ".join(str(start) for start in truth.timeline.starts)
    return (
        relative,
        CLASSES[label],
        starts,
        str(truth.timeline.end),
        f"{truth.busyness:.4f}",
        f"{truth.change:.4f}",
        str(truth.changed_steps),
        f"{truth.distractors:.4f}",
    )


def _run(jobs: list[_Job], workers: int) -> Iterator[tuple[_Job, tuple[str, ...]]]:
    """Write the videos; yield each job with its row, in any order."""
    if workers == 1:
        yield from ((job, _make(job)) for job in jobs)
        return
    with closing(run_each(_make, jobs, processes=workers, timeout_s=0)) as outcomes:
        for job, row, reason in outcomes:
            if row is None:
                raise ChildProcessError(f"{job[0]}: video {job[3]} of {job[2]} could not be made: {reason}")
            yield job, row


def _checked_spec(**parameters: Any) -> _Spec:
    counts = {
        name: _integer(name, parameters[name], least=least)
        for name, least in (("seed", 0), ("train", 1), ("test", 1), ("size", 1), ("frames", 1))
    }
    check_scene(counts["size"], counts["frames"], parameters["dwell"])
    return _Spec(version=VERSION, dwell=parameters["dwell"], distractors=bool(parameters["distractors"]), **counts)


def _integer(name: str, value: Any, *, least: int) -> int:
    number: int | None
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return number


def _is_complete(root: Path, spec: _Spec) -> bool:
    """Return whether `root` has the whole dataset; raise ValueError if it has something else."""
    way_out = "give another root or delete this folder"
    for name in (MARKER, UNFINISHED):
        try:
            found = json.loads((root / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise ValueError(f"{root / name} is not a record of a dataset's parameters; {way_out}") from error
        found = {"distractors": False, **found} if isinstance(found, dict) else {}  # a key that older folders lack
        for key, wanted in asdict(spec).items():
            if found.get(key) != wanted:
                raise ValueError(f"{root} holds a synthetic dataset with {key}={found.get(key)!r}, not {wanted!r}; {way_out}")
        return name == MARKER
    # Files without a record of their parameters may be of any origin.
    taken = next((name for name in (*SPLITS, "train.csv", "test.csv") if (root / name).exists()), None)
    if taken is not None:
        raise ValueError(f"{root} holds {taken} but no {MARKER}: not a synthetic dataset; {way_out}")
    return False


def _write_csv(path: Path, header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _write_atomically(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
