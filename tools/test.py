"""Test a checkpoint with several views of each video.

    python tools/test.py checkpoint=runs/default                     # its best.pt, or any file of its checkpoints/
    python tools/test.py checkpoint=... dataset.clip.views=10 model.sgs.num_bins=8

Writes results.json, predictions.csv, test_config.yaml (the whole config) and examples/ into the checkpoint's run
folder, where they replace those of the last test, or into trainer.output_dir. The config is the one that the
checkpoint was trained with; overrides change it.
"""

from __future__ import annotations

from atfr.engine.distributed.preemption import StopFlag, listen

if __name__ == "__main__":
    listen()  # before the imports, which take seconds

# ruff: noqa: E402
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from atfr.cli import builders, from_checkpoint
from atfr.cli.config import build, check_root, program
from atfr.cli.launch import on_every_process
from atfr.engine.distributed.comm import DistInfo
from atfr.engine.settings import TrainerSettings


@program("test", arguments=from_checkpoint.like_the_checkpoint)
def main(config: DictConfig) -> None:
    check_root(config)
    path = from_checkpoint.checkpoint_file(config.checkpoint)
    state = from_checkpoint.read(path)
    folder = from_checkpoint.results_folder(path, config.trainer.output_dir)
    config = from_checkpoint.with_overrides(state, config)
    settings: TrainerSettings = build(config.trainer, "trainer")
    stop = listen()
    work = partial(test, config, state, path, settings, folder=folder, stop=stop)
    on_every_process(work, config, settings, program=__file__, folder=folder, stop=stop, where="before the test")


def test(config: DictConfig, state: dict[str, Any], path: Path, settings: TrainerSettings, dist_info: DistInfo, folder: Path, stop: StopFlag) -> None:
    clip = builders.clip_settings(config)
    source = from_checkpoint.test_videos(config, state, path, dist_info)
    if dist_info.is_main:
        builders.report_missing(source, folder)
    model = from_checkpoint.trained_model(config, state, path, dist_info)
    model.prepare(compiled=settings.compile)
    with stop.only_sets_flag():
        builders.test_and_report(model, source, clip, config=config, settings=settings, dist_info=dist_info, folder=folder, checkpoint=path, stop=stop)


if __name__ == "__main__":
    main()
