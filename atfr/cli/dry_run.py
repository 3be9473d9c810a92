"""Print what a training would do, without doing it (`dry_run=true`)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from atfr.cli import builders
from atfr.cli.command.suggestions import CONFIGS
from atfr.cli.config import build
from atfr.cli.launch import processes_to_start
from atfr.cli.recipe import is_given
from atfr.data.clips import ClipSettings
from atfr.data.datasets.synthetic import NotGenerated
from atfr.data.lists.text import counted
from atfr.data.loader import TrainSampler
from atfr.data.types import VideoSource
from atfr.engine import stage_costs
from atfr.engine.distributed.comm import DistInfo
from atfr.engine.distributed.launch_env import read_launch_env
from atfr.engine.run.run_dir import flat
from atfr.engine.settings import TrainerSettings, precision_dtype
from atfr.models.pretrained.load import require_file
from atfr.models.video_net import VideoNet

COMMAND_LINE = "command line"
SHOWN = ("model", "dataset", "optimizer", "schedule", "trainer", "init_from")
HIDDEN = ("_target_", "_partial_", "clips", "prepare_hint")  # internal keys


def print_plan(config: DictConfig, settings: TrainerSettings, *, folder: Path) -> None:
    """Print the options and where each comes from, the processes, the network's cost and the data.

    Raises:
        ValueError, OSError: an error that would end the training at its start, such as a missing dataset.
    """
    cpu = DistInfo(0, 1, torch.device("cpu"))
    source = None
    problem: ValueError | OSError | None = None
    try:
        source = builders.load_source(config, cpu, make=False)
    except NotGenerated as error:
        problem = None if config.dataset.make is not False else error
    except (ValueError, OSError) as error:
        problem = error  # raised after printing all that does not depend on the data
    num_classes = len(source.class_names) if source else OmegaConf.select(config, "dataset.num_classes") or 400
    _print_section("options", options_table(config))
    _print_section("launch", _aligned({**launch_facts(settings), "run folder": str(folder)}))
    _print_section("network", network_table(config, num_classes, settings))
    if problem is not None:
        print("\ndata", flush=True)
        raise problem
    facts = data_facts(source) if source else {"videos": f"{config.dataset.train} train, {config.dataset.test} test; generated first, under {config.dataset.root}"}
    videos = len(source.train) if source else config.dataset.train
    _print_section("data", _aligned({**facts, **step_facts(videos, config, settings)}))


def _print_section(title: str, lines: Iterable[str]) -> None:
    print(f"\n{title}", *lines, sep="\n  ", flush=True)


def _aligned(facts: Mapping[str, str]) -> Iterator[str]:
    return (f"{name:<11}  {value}" for name, value in facts.items())


def network_table(config: DictConfig, num_classes: int, settings: TrainerSettings) -> list[str]:
    """Return lines about the network: how it runs, and the output, parameters and GFLOPs of each stage."""
    clip = builders.clip_settings(config)
    model = builders.build_model(config, num_classes=num_classes, dist_info=DistInfo(0, 1, torch.device("cpu")))
    check_start(config, model, clip, settings)
    table = builders.gflops_table(model, clip)
    bins = stage_costs.expected_bins(model, table)
    first = f"one clip of {clip.frames} frames, {clip.crop_size} x {clip.crop_size}, {counted(num_classes, 'class', 'classes')}; runs {model.execution}"
    if bins:
        first += f"; with SGS: a clip that keeps B' = {'/'.join(map(str, bins))} of {'/'.join(map(str, table.frames))} features"
    shape = (3, clip.frames, clip.crop_size, clip.crop_size)
    return [first, *stage_costs.as_table(stage_costs.stage_costs(model, table, shape, bins)).splitlines()]


def check_start(config: DictConfig, model: VideoNet, clip: ClipSettings, settings: TrainerSettings) -> None:
    """Raise the ValueError or OSError that a training would raise before its first step."""
    build(config.optimizer, "optimizer", model=model)
    build(config.schedule, "schedule")
    processes = world_size(settings)
    TrainSampler(1, seed=0, global_batch=settings.batch_size, world=processes)  # raises if a batch has fewer clips than processes
    builders.check_batch_norm(model, clip, settings, DistInfo(0, processes, torch.device("cpu")))
    start = builders.weights_given(config)
    if start is not None and start.published is None:
        require_file(start.file, start.option)


def world_size(settings: TrainerSettings) -> int:
    """Return the number of processes that would train, on all machines."""
    launch = read_launch_env(os.environ)
    return launch.world if launch.launcher != "none" else processes_to_start(settings.accelerator, settings.devices)


def options_table(config: DictConfig) -> Iterator[str]:
    """Yield lines of `key  value  source` for every option that a user may set."""
    sources = value_sources()
    values = {key: value for key, value in flat(OmegaConf.to_container(config, resolve=True)).items() if _is_shown(key)}
    raw = flat(OmegaConf.to_container(config, resolve=False))
    width = max(map(len, values))
    for key, value in values.items():
        source = sources.get(key, "")
        reference = raw.get(key)
        if isinstance(reference, str) and reference.startswith("${") and source != COMMAND_LINE:
            source += f": {reference}"
        shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        yield f"{key:<{width}}  {shown:<24}  {source}".rstrip()


def _is_shown(key: str) -> bool:
    parts = key.split(".")
    return parts[0] in SHOWN and not any(part in HIDDEN for part in parts) and not key.startswith("model.clip.")


def value_sources() -> dict[str, str]:
    """Map each key of the composed config to the file under configs/, or the command line, that set it last."""
    hydra = HydraConfig.get()
    choices = hydra.runtime.choices
    overrides = list(hydra.overrides.task)
    chosen = [f"{group}={choices[group]}" for group in ("model", "dataset", "experiment") if choices.get(group)]
    loader = GlobalHydra.instance().config_loader()
    defaults = loader.compute_defaults_list(hydra.job.config_name, [*chosen, *overrides], RunMode.RUN).defaults
    sources: dict[str, str] = {}
    own = [group for group in ("optimizer", "schedule") if is_given(group, overrides)]  # see `with_recipe`
    for default in defaults:
        path = CONFIGS / f"{default.config_path}.yaml"
        if default.config_path is None or default.config_path.startswith("hydra") or not path.exists():
            continue
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        assert isinstance(content, dict)
        content.pop("defaults", None)
        prefix = f"{default.package}." if default.package else ""
        keys = [key for key in flat(content, prefix) if not (default.config_path.startswith("experiment") and key.split(".")[0] in own)]
        sources.update(dict.fromkeys(keys, f"configs/{default.config_path}.yaml"))
    for override in OverridesParser.create().parse_overrides(overrides):
        if override.key_or_group not in choices:
            sources.update(dict.fromkeys([override.key_or_group, *_below(override.key_or_group, sources)], COMMAND_LINE))
    return sources


def _below(key: str, sources: Mapping[str, str]) -> list[str]:
    return [other for other in sources if other.startswith(f"{key}.")]


def launch_facts(settings: TrainerSettings) -> dict[str, str]:
    """Return the processes, their device, and how the batch is split among them."""
    launch = read_launch_env(os.environ)
    world = world_size(settings)
    gpus = torch.cuda.device_count() if settings.accelerator != "cpu" else 0
    device = torch.device("cuda" if gpus else "cpu")
    names = torch.cuda.get_device_name(0) if gpus else f"CPU, {torch.get_num_threads()} threads"
    started = {"none": "this command", "torchrun": "torchrun", "srun": "srun"}[launch.launcher]
    precision = str(precision_dtype(settings.precision, device)).removeprefix("torch.")
    share = -(-settings.batch_size // world)
    return {
        "processes": f"{world}, started by {started}" + (f", rendezvous at {launch.address}:{launch.port}" if launch.address else ""),
        "device": f"{names}; {precision}",
        "batch": f"{settings.batch_size} clips, {share} a process" + (f" in {settings.accumulate} parts" if settings.accumulate > 1 else ""),
        "workers": f"{settings.workers} loader processes for each process",
    }


def data_facts(source: VideoSource) -> dict[str, str]:
    """Return the numbers of videos and classes."""
    facts = {
        "dataset": f"{source.name}, {counted(len(source.class_names), 'class', 'classes')}; root {source.notes.get('root', '')}",
        "videos": ", ".join(f"{len(getattr(source, split))} {split}" for split in ("train", "val", "test")),
    }
    missing = {split: len(paths) for split, paths in source.missing.items() if paths}
    return {**facts, "missing": ", ".join(f"{count} {split}" for split, count in missing.items())} if missing else facts


def step_facts(videos: int, config: DictConfig, settings: TrainerSettings) -> dict[str, str]:
    """Return the optimizer steps for this number of training videos, and the views of a test video."""
    clip = config.dataset.clip
    facts = {"test": f"{clip.views} views x {clip.crops} crops a video" if settings.test else "none (trainer.test=false)"}
    if not videos:
        return facts
    epoch = len(TrainSampler(videos, seed=0, global_batch=settings.batch_size))
    epoch = min(epoch, settings.overfit_batches or epoch)
    total = epoch * settings.epochs
    stop = f", stops after {settings.max_steps}" if settings.max_steps is not None else ""
    warmup = config.schedule.get("warmup", 0) * total
    return {"steps": f"{epoch} an epoch, {total:,} in {settings.epochs} epochs{stop}; warm-up {warmup:.0f} steps", **facts}
