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
from atfr.cli.classifier import Classifier
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
            dense = atfr.load(weights).with_views(views=arguments.views)
            show("dense", dense, video)
            sampled = atfr.load(weights, sgs="atfr", after=arguments.after).with_views(views=arguments.views)
            sampled.set_budget(arguments.gflops, [video])
            show(f"with SGS after {arguments.after}", sampled, video)
            save(sampled.picture(video), arguments.output)
        except (ValueError, OSError, VideoError) as error:
            sys.exit(f"error: {error}")
    print(f"which frames went together: {arguments.output}")


def generated(path: Path) -> str:
    """Write a built-in video."""
    print("no VIDEO given: this is a generated one of moving shapes, which shows none of the 400 classes")
    with h264_file(path, rate=10, keyframe=12) as add:
        for frame in render(61, split="test", size=160)[0]:
            add(frame)
    return str(path)


def show(name: str, classifier: Classifier, video: str) -> None:
    result = classifier(video)
    kept = " ".join("/".join(map(str, bins)) for bins in result.bins)
    print(f"\n{name}: {result.gflops:.1f} of {result.dense_gflops:.1f} GFLOPs a clip, B' {kept}")
    for label, probability in zip(result.labels, result.probabilities):
        print(f"  {100 * probability:>5.1f} %  {label}")


if __name__ == "__main__":
    main()
