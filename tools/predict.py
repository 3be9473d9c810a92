"""Classify videos with a trained network.

    python tools/predict.py checkpoint=runs/default video=clip.mp4
    python tools/predict.py checkpoint=runs/default video='clips/*.mp4' format=csv output=found.csv pictures=pictures
    python tools/predict.py checkpoint=runs/default video=long.mp4 window_s=4 hop_s=2 pictures=pictures    # a timeline
    python tools/predict.py checkpoint=runs/default video=clip.mp4 gflops=0.3                              # another budget

Prints the most probable classes, averaged over the views of each video, with B' and GFLOPs. Videos that cannot be
read are listed at the end, with exit code 1 if there are no others. `video` is a file, a folder, a pattern or a list of these.
"""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from atfr.cli.classifier import Classifier, load
from atfr.cli.config import build, program
from atfr.cli.predict import PredictSettings, find_videos, lines_of
from atfr.data.lists.text import counted
from atfr.data.types import VideoError
from atfr.engine.determinism import choose_algorithms
from atfr.utils.atomic_io import atomic_write

CALIBRATED = 64  # videos at most, to set a budget


@program("predict")
def main(config: DictConfig) -> None:
    values = OmegaConf.create({"_target_": f"{PredictSettings.__module__}.PredictSettings", **OmegaConf.to_container(config)})
    settings: PredictSettings = build(values, "")
    choose_algorithms(deterministic=False, tf32=False)  # as trainer.tf32 is in a test
    paths = find_videos(settings.video)
    classifier = prepared(settings, paths)
    failed: list[VideoError] = []
    lines = lines_of(classifier, paths, settings, failed)
    if settings.output is None:
        for text in lines:
            print(text, end="", flush=True)
    else:
        with atomic_write(Path(settings.output).expanduser()) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            file.writelines(lines)
        print(f"{counted(len(paths) - len(failed), 'video', 'videos')} in {settings.output}")
    for error in failed:
        print(error, file=sys.stderr)
    if len(failed) == len(paths):
        raise ValueError(f"none of the {len(paths)} videos could be read")


def prepared(settings: PredictSettings, paths: list[str]) -> Classifier:
    """Load the classifier, with the views and the budget of the settings."""
    classifier = load(settings.checkpoint, sgs=settings.sgs, after=settings.after, device=settings.device)
    changed = {name: value for name, value in (("views", settings.views), ("crops", settings.crops)) if value is not None}
    if changed:
        classifier = classifier.with_views(**changed)
    if settings.gflops is not None:
        if not classifier.model.sgs:
            raise ValueError(f"checkpoint={settings.checkpoint} has no SGS layer whose budget gflops={settings.gflops} could set: add sgs=atfr")
        used = paths[:CALIBRATED]
        share = classifier.set_budget(settings.gflops, used)
        print(f"gflops={settings.gflops}: {share:.0%} of the dense GFLOPs on the {counted(len(used), 'video', 'videos')} that it is calibrated on", file=sys.stderr)
    return classifier


if __name__ == "__main__":
    main()
