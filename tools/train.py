"""Train a video network and test its best checkpoint.

    python tools/train.py                                  # built-in data, a tiny X3D with SGS
    python tools/train.py dataset=kinetics400 model=x3d_sgs dataset.root=/data/k400
    python tools/train.py ... dry_run=true                 # print what would run
    python tools/train.py ... trainer.devices=2            # two ranks; the default is one per GPU
    python tools/train.py ... init_from=RUN trainer.output_dir=OTHER   # start from the weights of another run

torchrun, srun and submitit may start the ranks instead. Run the same command again to continue a run that was stopped.
Options: configs/train.yaml.
"""

from __future__ import annotations

from atfr.engine.distributed.preemption import StopFlag, listen

if __name__ == "__main__":
    listen()  # before the slow imports, during which a signal would end the program

# ruff: noqa: E402
import os
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from atfr.cli import builders
from atfr.cli.command.run_name import in_sweep, report_command, run_folder
from atfr.cli.config import build, check_root, choices, program, take_dry_run
from atfr.cli.dry_run import print_plan
from atfr.cli.hyperparameters import hyperparameters
from atfr.cli.launch import on_every_process
from atfr.cli.recipe import Announcement, require_weights, say, with_experiment, with_recipe
from atfr.cli.validation import Validator
from atfr.data.lists.text import counted
from atfr.data.mixup import mixing
from atfr.data.transforms import Normalizer
from atfr.data.types import VideoSource
from atfr.engine.distributed import comm
from atfr.engine.distributed.launch_env import read_launch_env
from atfr.engine.run import checkpoint
from atfr.engine.run.contents import contents, resumed_step
from atfr.engine.run.run_dir import check_folder, write_config
from atfr.engine.settings import TrainerSettings
from atfr.engine.trainer import Trainer
from atfr.models.video_net import VideoNet


@program("train", otherwise=with_experiment)
def main(config: DictConfig) -> None:
    config, recipe = with_recipe(config)
    dry_run = take_dry_run(config)
    check_root(config)
    require_weights(config)
    settings: TrainerSettings = build(config.trainer, "trainer")
    folder, stop = run_folder(settings.output_dir), listen()
    if dry_run:
        if read_launch_env(os.environ).rank == 0:
            say([*recipe.before, *recipe.after])
            print_plan(config, settings, folder=folder)
        return
    work = partial(train_and_test, config, settings, folder=folder, stop=stop, recipe=recipe)
    on_every_process(work, config, settings, program=__file__, folder=folder, alone=True, stop=stop, where="before training")


def train_and_test(config: DictConfig, settings: TrainerSettings, dist_info: comm.DistInfo, folder: Path, stop: StopFlag, recipe: Announcement) -> None:
    """Train and test on this rank."""
    if dist_info.is_main:
        say(recipe.before)
    clip = builders.clip_settings(config)
    with stop.raises_immediately("before training"):
        source = builders.load_source(config, dist_info)
    builders.require_videos(source, "train", "val", *(["test"] if settings.test else []))
    # A run that resumes has its own weights.
    starts, given = not (folder / "checkpoints" / "last.pt").exists(), builders.weights_given(config)
    num_classes = len(source.class_names)
    model = builders.build_model(config, num_classes=num_classes, dist_info=dist_info, seed=settings.seed)
    if starts:
        builders.load_given_weights(model, config, num_classes=num_classes, dist_info=dist_info, whole=False)
    builders.check_batch_norm(model, clip, settings, dist_info)
    plain = OmegaConf.to_container(config, resolve=True)
    identity = {"config": plain, "choices": choices(), "class_names": list(source.class_names), "contents": contents(source, given and given.file)}
    # What may be refused comes first: such a start writes nothing into the run folder, and `run_lock` removes a new one.
    if starts:
        builders.check_budgets(model, clip)
    optimizer, learning_rate_factor = build(config.optimizer, "optimizer", model=model), build(config.schedule, "schedule")
    steps_per_epoch, batches = builders.train_batches(source, clip, settings, dist_info)
    mix = mixing(mixup=settings.mixup, cutmix=settings.cutmix, num_classes=num_classes, seed=settings.seed)
    resumed = None
    if dist_info.is_main:
        resumed = claim(folder, identity, settings, given)
        print(summary(source, model, dist_info, folder), flush=True)
        say(recipe.after)
        builders.report_missing(source, folder)
        builders.say_what_chooses_the_epoch(source, config, settings)
    comm.barrier()

    trainer = Trainer(
        model=model,
        optimizer=optimizer,
        learning_rate_factor=learning_rate_factor,
        batches=batches,
        steps_per_epoch=steps_per_epoch,
        validate=Validator(model, source, clip, settings=settings, dist_info=dist_info, stop=stop),
        normalise=Normalizer(clip.mean, clip.std).to(dist_info.device),
        settings=settings,
        dist_info=dist_info,
        folder=folder,
        identity=identity,
        hyperparameters=hyperparameters(config, choices(), HydraConfig.get().overrides.task),
        mix=mix,
        stop=stop,
    )
    if resumed == trainer.end_step:
        print(f"training is complete at step {resumed} of {resumed}" + ("; the run is only tested again" if settings.test else ""), flush=True)
    with stop.only_sets_flag():
        trainer.run()
        if settings.test:
            best = trainer.checkpointer.best
            checkpoint.load_weights(model, checkpoint.load(best)["model"], best)
            results = builders.test_and_report(
                model, source, clip, config=config, settings=settings, dist_info=dist_info, folder=folder, checkpoint=best, stop=stop
            )
            if results is not None:
                values = {name: results[name] for name in ("top1", "top5", "mean_class_accuracy")}
                trainer.logger.write_test({**values, "gflops": results["gflops"]["mean"], "bins": results["bins"]["mean"]}, step=trainer.state.step)
            if dist_info.is_main and not in_sweep():
                print(report_command(folder), flush=True)


def claim(folder: Path, identity: dict[str, Any], settings: TrainerSettings, given: builders.Start | None) -> int | None:
    """Write the config into the run folder, after checking that a run there may resume. Returns the step from which it does."""
    check_folder(folder, identity["config"], "training", resume=settings.resume)
    resumed = resumed_step(folder, identity)
    write_config(folder, identity["config"])
    last = folder / "checkpoints" / "last.pt"
    if resumed is not None and given is not None:
        print(f"{given.option} is ignored: this run resumes from {last}", flush=True)
    return resumed


def summary(source: VideoSource, model: VideoNet, dist_info: comm.DistInfo, folder: Path) -> str:
    """Return a line about the videos, the network and where the run goes."""
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    same = " (the same)" if builders.validates_on_test(source) else ""
    return (
        f"{source.name}: {len(source.train)} training, {len(source.val)} validation, {len(source.test)} test videos{same},"
        f" {counted(len(source.class_names), 'class', 'classes')}; {millions:.2f} M parameters, {model.execution}, on {dist_info.device}; run folder {folder}"
    )


if __name__ == "__main__":
    main()
