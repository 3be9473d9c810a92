"""Test a checkpoint with several views of each video.

    python tools/test.py checkpoint=runs/default                     # its best.pt, or any file of its checkpoints/
    python tools/test.py checkpoint=... dataset.clip.views=10 model.sgs.num_bins=8

Writes results.json, predictions.csv and test_config.yaml, the whole config, into the checkpoint's run
folder, or into trainer.output_dir. The config is the one that the checkpoint was trained with; overrides change it.
"""

from __future__ import annotations

from atfr.engine.interruption import StopFlag, listen

if __name__ == "__main__":
    listen()  # before the imports, which take seconds

# ruff: noqa: E402
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from atfr import checkpoint_config, jobs
from atfr.configuration import build, check_root, program
from atfr.engine.distributed import Ranks
from atfr.engine.settings import TrainerSettings
from atfr.launch import on_every_process


@program("test", arguments=checkpoint_config.like_the_checkpoint)
def main(config: DictConfig) -> None:
    check_root(config)
    path = checkpoint_config.checkpoint_file(config.checkpoint)
    state = checkpoint_config.read(path)
    folder = checkpoint_config.results_folder(path, config.trainer.output_dir)
    config = checkpoint_config.with_overrides(state, config)
    settings: TrainerSettings = build(config.trainer, "trainer")
    stop = listen()
    work = partial(test, config, state, path, settings, folder=folder, stop=stop)
    on_every_process(work, config, settings, program=__file__, folder=folder, stop=stop, where="before the test")


def test(config: DictConfig, state: dict[str, Any], path: Path, settings: TrainerSettings, ranks: Ranks, folder: Path, stop: StopFlag) -> None:
    clip = jobs.clip_settings(config)
    source = checkpoint_config.test_videos(config, state, path, ranks)
    if ranks.is_main:
        jobs.report_missing(source, folder)
    model = checkpoint_config.trained_model(config, state, path, ranks)
    model.prepare(compiled=settings.compile)
    with stop.only_noted():
        jobs.test_and_report(model, source, clip, config=config, settings=settings, ranks=ranks, folder=folder, checkpoint=path, stop=stop)


if __name__ == "__main__":
    main()
