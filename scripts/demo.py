"""Classify a video with DeepMind's I3D, dense and with SGS, and draw which frames were merged.

    make demo VIDEO=clip.mp4            # or: python scripts/demo.py clip.mp4
    make demo                           # a generated video, which shows none of the 400 classes

Fetches the weights at the first time (47 MB, see scripts/fetch_weights.py). Nothing is trained: SGS is calibrated on the video
itself. Writes demo.png.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from fetch_weights import checkpoint_of_i3d

import atfr
from atfr.cli.classifier import Classification
from atfr.data.datasets.synthetic_scene import render
from atfr.data.types import VideoError
from atfr.data.video.encode import h264_file
from atfr.viz.merges import save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", nargs="?", help="a video of one of the 400 Kinetics classes")
    parser.add_argument("--gflops", type=float, default=0.5, help="mean share of the dense GFLOPs (default: %(default)s)")
    parser.add_argument("--after", default="input", help="where SGS samples (default: %(default)s)")
    parser.add_argument("--views", type=int, default=2, help="clips of the video (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("demo.png"), metavar="FILE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            video = arguments.video or generated(Path(folder) / "generated.mp4")
            weights = checkpoint_of_i3d()
            say(f"1 of 4: classifying {arguments.views} views with the dense network; on a CPU each of the four takes up to a minute")
            dense = atfr.load(weights).with_views(views=arguments.views)(video)
            print(f"\ndense: {dense}\n")
            say(f"2 of 4: calibrating SGS to {arguments.gflops:.0%} of the GFLOPs")
            classifier = atfr.load(weights, sgs="atfr", after=arguments.after).with_views(views=arguments.views)
            classifier.set_budget(arguments.gflops, [video])
            say("3 of 4: classifying with SGS")
            sampled = classifier(video)
            print(f"\nwith SGS after {arguments.after}: {sampled}")
            print(f"\n{verdict(dense, sampled)}\n")
            say("4 of 4: drawing which frames were merged")
            save(classifier.picture(video), arguments.output)
        except (ValueError, OSError, VideoError) as error:
            sys.exit(f"error: {error}")
    print(f"Which frames of view {arguments.views // 2 + 1} of {arguments.views} went together: {arguments.output}")


def say(text: str) -> None:
    """Print what takes long now, also into a pipe."""
    print(text, flush=True)


def generated(path: Path) -> str:
    """Write a built-in video."""
    print("no VIDEO given: this is a generated one of moving shapes, which shows none of the 400 classes")
    with h264_file(path, rate=10, keyframe=12) as add:
        for frame in render(61, split="test", size=160)[0]:
            add(frame)
    return str(path)


def verdict(dense: Classification, sampled: Classification) -> str:
    """Say whether SGS changed the answer."""
    share = f"{sampled.gflops / dense.gflops:.0%} of the GFLOPs"
    if dense.labels[0] == sampled.labels[0]:
        probability = f"its probability is {sampled.probabilities[0]:.0%} instead of {dense.probabilities[0]:.0%}"
        return f"The first answer is the same with {share}; {probability}."
    return (
        f"The first answer is another with {share}: {sampled.labels[0]} instead of {dense.labels[0]}."
        " The network was trained without SGS, and merging loses some classes; with a larger --gflops less is merged."
    )


if __name__ == "__main__":
    main()
