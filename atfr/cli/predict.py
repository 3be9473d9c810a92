"""Find videos, classify them, and write the results as a table, CSV or JSON lines."""

from __future__ import annotations

import csv
import glob
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from atfr.cli.classifier import Classification, Classifier
from atfr.data.types import VideoError
from atfr.data.video.decode import read_clip
from atfr.utils.progress import watched

if TYPE_CHECKING:
    from atfr.viz.timeline import Window

SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".mpg", ".mpeg", ".m4v", ".wmv", ".flv", ".3gp", ".ts")
FORMATS = ("table", "csv", "jsonl")


@dataclass(frozen=True)
class PredictSettings:
    """The options of tools/predict.py; configs/predict.yaml explains them."""

    checkpoint: str
    video: str | list[str]
    top: int = 5
    gflops: float | None = None
    sgs: str | None = None
    after: str | None = None
    views: int | None = None
    crops: int | None = None
    format: str = "table"
    output: str | None = None
    pictures: str | None = None
    window_s: float | None = None
    hop_s: float | None = None
    batch_size: int = 8
    workers: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format={self.format} does not exist; choose one of {', '.join(FORMATS)}")
        if self.sgs is not None and self.gflops is None:
            raise ValueError(f"sgs={self.sgs} needs a budget: add gflops=0.5")
        if self.gflops is not None and not 0 < self.gflops <= 1:
            raise ValueError(f"gflops={self.gflops} must be above 0 and at most 1: a share of the dense GFLOPs")
        if self.hop_s is not None and self.window_s is None:
            raise ValueError("hop_s is the distance between windows: set window_s, too")
        for name in ("top", "views", "batch_size", "window_s", "hop_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be above 0")


def find_videos(given: str | Sequence[str]) -> list[str]:
    """Return the video files that names, folders and patterns stand for, each once. Folders are searched with their subfolders.

    Raises:
        ValueError: a name stands for no video.
    """
    found: dict[str, None] = {}
    for one in [given] if isinstance(given, str) else given:
        name = os.path.expanduser(one)
        if os.path.isdir(name):
            paths = sorted(str(path) for path in Path(name).rglob("*") if path.suffix.lower() in SUFFIXES)
        else:
            paths = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        if not paths:
            what = f"holds no file with one of the endings {' '.join(SUFFIXES)}" if os.path.isdir(name) else "does not exist, and no file fits it as a pattern"
            raise ValueError(f"video={one} {what}")
        found.update(dict.fromkeys(paths))
    return list(found)


def windows_of(classifier: Classifier, path: str, *, window_s: float, hop_s: float, top: int = 5, batch_size: int = 8) -> list[tuple[Window, Classification]]:
    """Classify windows of `window_s` seconds, spread evenly from the start of a video to its end, at most `hop_s` apart.

    Raises:
        VideoError: the video cannot be read, or its frame rate is unknown.
    """
    from atfr.viz.timeline import Window  # matplotlib takes half a second to import

    duration = duration_of(path)
    count = max(math.ceil((duration - window_s) / hop_s - 1e-6) + 1, 1)
    clip = classifier.clip
    spread = classifier.with_views(views=count, crops=1, sampling="dense", fps=clip.stride * clip.frames / window_s, fallback_fps=None)
    starts = np.linspace(0, max(duration - window_s, 0), count)
    results = spread.each_view(path, top=top, batch_size=batch_size)
    return [
        (Window(float(start), float(min(start + window_s, duration)), one.labels[0], one.probabilities[0], one.gflops / one.dense_gflops), one)
        for start, one in zip(starts, results)
    ]


def duration_of(path: str) -> float:
    """Return the length of a video in seconds."""
    first = read_clip(path, lambda num_frames, fps: np.zeros(1, dtype=np.int64), short_side=16)
    if not first.fps:
        raise VideoError(path, "its frame rate is unknown, so it has no windows of seconds: leave out window_s")
    return first.num_frames / first.fps


class Writer:
    """Formats results. `rows` are videos; with `windows`, parts of videos."""

    def __init__(self, form: str, *, windows: bool = False) -> None:
        self.form, self.windows = form, windows

    def header(self) -> str:
        """The first lines of the output."""
        names = ["video", *(["start_s", "end_s"] if self.windows else []), "rank", "label", "probability", "bins", "gflops", "dense_gflops"]
        return _csv_line(names) if self.form == "csv" else ""

    def result(self, result: Classification, window: Window | None = None) -> str:
        """The lines of one video or window."""
        bins = ["/".join(map(str, kept)) for kept in result.bins]
        times = [] if window is None else [f"{window.start:.2f}", f"{window.end:.2f}"]
        if self.form == "csv":
            rows = ([result.path, *times, rank, label, f"{p:.4f}", " ".join(bins), f"{result.gflops:.4g}", f"{result.dense_gflops:.4g}"]
                    for rank, (label, p) in enumerate(zip(result.labels, result.probabilities), start=1))  # fmt: skip
            return "".join(map(_csv_line, rows))
        if self.form == "jsonl":
            span = {} if window is None else {"start_s": window.start, "end_s": window.end}
            classes = [{"label": label, "probability": p} for label, p in zip(result.labels, result.probabilities)]
            return json.dumps({"video": result.path, **span, "classes": classes, "bins": bins, "gflops": result.gflops, "dense_gflops": result.dense_gflops}) + "\n"
        if window is not None:
            return f"{window.start:>8.1f} s to {window.end:>6.1f} s  {window.label:<32} {window.probability:>4.0%}, {window.cost:>4.0%} of the dense GFLOPs\n"
        return f"{result}\n"

    def failed(self, error: VideoError) -> str:
        """The line of a video that cannot be read; empty in formats that have no place for it."""
        return json.dumps({"video": error.path, "error": str(error)}) + "\n" if self.form == "jsonl" else ""


def _csv_line(cells: Iterable[object]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def lines_of(classifier: Classifier, paths: Sequence[str], settings: PredictSettings, failed: list[VideoError]) -> Iterator[str]:
    """Yield the output, video after video. Videos that cannot be read go to `failed`."""
    writer = Writer(settings.format, windows=settings.window_s is not None)
    yield writer.header()
    yield from (_lines_of_windows if settings.window_s is not None else _lines_of_videos)(classifier, paths, settings, writer, failed)


def _lines_of_videos(classifier: Classifier, paths: Sequence[str], settings: PredictSettings, writer: Writer, failed: list[VideoError]) -> Iterator[str]:
    files = picture_files(paths, Path(settings.pictures)) if settings.pictures is not None else {}
    results = classifier.classify(paths, top=settings.top, batch_size=settings.batch_size, workers=settings.workers, progress=len(paths) > 1)
    for result in results:
        if isinstance(result, VideoError):
            failed.append(result)
            yield writer.failed(result)
            continue
        yield writer.result(result)
        if files:
            from atfr.viz.merges import save

            save(classifier.picture(result.path), files[result.path])


def _lines_of_windows(classifier: Classifier, paths: Sequence[str], settings: PredictSettings, writer: Writer, failed: list[VideoError]) -> Iterator[str]:
    from atfr.viz.merges import save
    from atfr.viz.timeline import timeline_picture

    assert settings.window_s is not None
    files = picture_files(paths, Path(settings.pictures)) if settings.pictures is not None else {}
    for path in watched(paths, "prediction", unit="video", shown=len(paths) > 1):
        try:
            found = windows_of(classifier, path, window_s=settings.window_s, hop_s=settings.hop_s or settings.window_s / 2, top=settings.top, batch_size=settings.batch_size)
            windows = [window for window, _ in found]
            if files:
                save(timeline_picture(middle_frames(path, windows), windows), files[path])
        except VideoError as error:
            failed.append(error)
            continue
        if settings.format == "table":
            yield f"{path}\n"
        yield from (writer.result(result, window) for window, result in found)


def middle_frames(path: str, windows: Sequence[Window]) -> np.ndarray:
    """Return the middle frame of each window: uint8 [windows, H, W, 3]."""
    middles = [(window.start + window.end) / 2 for window in windows]

    def pick(num_frames: int, fps: float | None) -> np.ndarray:
        return np.clip(np.round(np.array(middles) * (fps or 1)), 0, num_frames - 1).astype(np.int64)

    return read_clip(path, pick, short_side=160).frames


def picture_files(paths: Sequence[str], folder: Path) -> dict[str, Path]:
    """Return a file in the folder for each video, named for it; with a number where several have one name."""
    files: dict[str, Path] = {}
    for path in paths:
        stem, number = Path(path).stem, 1
        while (file := folder / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png")) in files.values():
            number += 1
        files[path] = file
    return files
