"""PyAV against decord on real files: are the frames the ones asked for, and how long does a clip take?

    python benchmarks/decoders.py FOLDER [--files 12] [--save]

FOLDER has one folder a set of videos. A clip is 16 frames, every 4th, from a random start; PyAV's frames, whose
positions the tests hold against a full decode, are the reference. Prints one line a set; with --save the result is also
written to benchmarks/results/decoders-cpu.txt.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from pathlib import Path

import av
import decord
import numpy as np

from atfr.data.types import VideoError
from atfr.data.video.av_reader import AvVideo

SAVED = Path(__file__).parent / "results" / "decoders-cpu.txt"
SUFFIXES = {".avi", ".mp4", ".webm", ".mkv", ".mov", ".mpg"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--files", type=int, default=12, help="the most files of a set to read")
    parser.add_argument("--save", action="store_true", help=f"write {SAVED.relative_to(SAVED.parent.parent.parent)}")
    arguments = parser.parse_args()
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    say(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, PyAV {av.__version__}, decord {decord.__version__}")
    decord.logging.set_level(decord.logging.QUIET)
    rng = np.random.default_rng(0)
    say(f"{'set':<24}{'files':>6}{'same frames':>14}{'PyAV ms/clip':>14}{'decord ms/clip':>16}")
    for folder in sorted(path for path in arguments.folder.iterdir() if path.is_dir()):
        rows = []
        for path in sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES)[: arguments.files]:
            try:
                rows.append(compare(str(path), rng))
            except (VideoError, RuntimeError, decord.DECORDError) as error:
                say(f"{path.relative_to(arguments.folder)}: {' '.join(str(error).split())[:200]}")
        if rows:
            same, frames, pyav, other = np.array(rows).sum(axis=0)
            say(f"{folder.name:<24}{len(rows):>6}{same:>8.0f}/{frames:<5.0f}{1e3 * pyav / len(rows):>14.1f}{1e3 * other / len(rows):>16.1f}")
    if arguments.save:
        SAVED.write_text("\n".join([f"$ python benchmarks/decoders.py {' '.join(sys.argv[1:])}", *lines]) + "\n")


def compare(path: str, rng: np.random.Generator) -> tuple[int, int, float, float]:
    """(frames that agree, frames, PyAV seconds, decord seconds) of one clip at full size."""
    count = AvVideo(path).num_frames
    start = rng.integers(max(1, count - 61))
    wanted = sorted({min(int(start) + 4 * t, max(count - 3, 0)) for t in range(16)})
    began = time.perf_counter()
    ours, _ = AvVideo(path).read(wanted, None)
    pyav = time.perf_counter() - began
    began = time.perf_counter()
    theirs = decord.VideoReader(path, num_threads=1).get_batch(wanted).asnumpy()
    other = time.perf_counter() - began
    # Two decoders differ by rounding in the colour conversion, neighbouring frames by much more.
    same = sum(np.abs(ours[t].astype(int) - theirs[i]).mean() < 4 for i, t in enumerate(wanted))
    return same, len(wanted), pyav, other


if __name__ == "__main__":
    main()
