"""Test a checkpoint with several views of each video.

    python tools/test.py checkpoint=runs/default/checkpoints/best.pt
    python tools/test.py checkpoint=... dataset.clip.views=10 model.sgs.num_bins=8

Writes results.json and predictions.csv into the checkpoint's run folder, or into
trainer.output_dir. The config is the one that the checkpoint was trained with; overrides change it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf

from atfr import jobs
from atfr.configuration import build, check_root, one_line_errors
from atfr.engine import checkpoint, distributed
from atfr.engine.settings import TrainerSettings


@hydra.main(version_base="1.3", config_path="../configs", config_name="test")
@one_line_errors
def main(config: DictConfig) -> None:
    check_root(config)
    path = Path(config.checkpoint)
    state = checkpoint.load(path)
    config = with_overrides(state, config)
    settings: TrainerSettings = build(config.trainer, "trainer")
    ranks = distributed.start(accelerator=settings.accelerator, devices=settings.devices)
    try:
        clip = jobs.clip_settings(config)
        source = jobs.load_source(config, ranks)
        if list(source.class_names) != state["class_names"]:
            raise ValueError(
                f"checkpoint {path} was trained for {len(state['class_names'])} classes ({', '.join(state['class_names'][:3])}, ...),"
                f" dataset {source.name} has {len(source.class_names)} ({', '.join(source.class_names[:3])}, ...)"
            )
        jobs.require_videos(source, "test")
        model = jobs.build_model(config, num_classes=len(source.class_names), ranks=ranks)
        checkpoint.load_weights(model, state["model"], path)
        folder = Path(settings.output_dir)
        jobs.test_and_report(model, source, clip, config=config, settings=settings, ranks=ranks, folder=folder, checkpoint=path)
    finally:
        distributed.stop()


def with_overrides(state: dict[str, Any], composed: DictConfig) -> DictConfig:
    """The checkpoint's own config with what this command overrides taken from the composed one."""
    config = OmegaConf.create(state["config"])
    path = Path(composed.checkpoint)
    if path.parent.name == "checkpoints":
        config.trainer.output_dir = str(path.parent.parent)
    elif composed.trainer.output_dir is None:
        raise ValueError(f"checkpoint {path} is in no run folder's checkpoints/; add trainer.output_dir=... for the results")
    config.trainer.devices, config.trainer.accelerator = None, "auto"
    now = HydraConfig.get().runtime.choices
    given = given_overrides(HydraConfig.get().overrides.task)
    for override in sorted(given, key=lambda override: "." in override):  # whole groups before single keys
        if override != "checkpoint" and (override not in now or now[override] != state["choices"].get(override)):
            key = override.replace("/", ".")
            OmegaConf.update(config, key, OmegaConf.select(composed, key), merge=False, force_add=True)
    return config


def given_overrides(arguments: list[str]) -> list[str]:
    """The keys that a command line overrides, groups among them."""
    overrides = [a for a in arguments if "=" in a and not a.startswith("-")]
    return [override.key_or_group for override in OverridesParser.create().parse_overrides(overrides)]


def quoted(argument: str) -> str:
    """A checkpoint's path in quotes: hydra would not take the = and , of a run folder's name without."""
    key, _, path = argument.partition("=")
    return f"checkpoint='{path}'" if key == "checkpoint" and path[:1] not in ("'", '"') else argument


def compose_like_the_checkpoint(arguments: list[str]) -> list[str]:
    """Let hydra compose from the config groups that the checkpoint was trained with."""
    paths = [argument.partition("=")[2].strip("'\"") for argument in arguments if argument.startswith("checkpoint=")]
    try:
        chosen = checkpoint.load(Path(paths[-1]))["choices"] if paths else {}
        given = given_overrides(arguments)
    except (ValueError, OSError, OverrideParseException):
        return []  # main or hydra says what is wrong
    # Nor does a group inside one that is given, such as model/sgs in another model, come from the checkpoint.
    return [f"{group}={choice}" for group, choice in chosen.items() if not {group, group.split("/")[0]} & set(given)]


if __name__ == "__main__":
    arguments = [quoted(argument) for argument in sys.argv[1:]]
    sys.argv[1:] = [*compose_like_the_checkpoint(arguments), *arguments]
    main()
