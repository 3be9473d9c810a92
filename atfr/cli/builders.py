"""Build the data and the network from a config, and test the network, for the programs in tools/."""

from __future__ import annotations

import zlib
from contextlib import nullcontext
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any, Callable, Iterable, NamedTuple, Sequence

import torch
from omegaconf import DictConfig, OmegaConf

from atfr.cli.config import build, warn_of_ignored
from atfr.data.clips import ClipSettings, TestClips, TrainClips
from atfr.data.known_bad import leave_out_bad
from atfr.data.loader import TrainSampler, test_loader, train_loader, with_time_limit
from atfr.data.transforms import Normalizer
from atfr.data.types import Video, VideoSource
from atfr.engine import metrics
from atfr.engine.budgets import keep_ratio_for
from atfr.engine.distributed import comm
from atfr.engine.distributed.comm import DistInfo
from atfr.engine.distributed.preemption import StopFlag
from atfr.engine.evaluator import Evaluation, evaluate
from atfr.engine.examples import write_examples
from atfr.engine.settings import TrainerSettings, precision_dtype
from atfr.models.factory import BACKBONES, full_name
from atfr.models.flops import GflopsTable
from atfr.models.pretrained.load import load_pretrained
from atfr.models.pretrained.published import Published, find_published
from atfr.models.video_net import VideoNet
from atfr.utils.atomic_io import write_text
from atfr.utils.optional import or_warn
from atfr.utils.printable import printable

# Options of `dataset.clip` that only affect training or speed. All others belong to a test's protocol.
NOT_OF_A_TEST = ("train_short_side", "train_scale", "flip", "randaugment", "color_jitter", "erasing", "cache")
SYNTHETIC = "atfr.data.datasets.synthetic.synthetic"  # the dataset that can be generated


def load_source(config: DictConfig, dist_info: DistInfo, *, make: bool = True) -> VideoSource:
    """Return the dataset's videos, without the training videos that `dataset.manifest` lists as bad.

    Rank 0 runs first, because it may have to generate the videos. It prints the warnings about the lists.

    Args:
        make: the value of `dataset.make` where it is null: whether the built-in dataset may be generated.

    Raises:
        ValueError: the ranks have different videos or classes.
    """
    extra = {} if make or config.dataset.get("make") is not None or config.dataset._target_ != SYNTHETIC else {"make": False}
    with comm.main_first(dist_info):
        source = build(config.dataset, "dataset", **extra)
    manifest = config.dataset.get("manifest")
    if manifest is not None and source.train:
        listed = len(source.train)
        source = leave_out_bad(source, str(manifest), decoder=config.dataset.clip.decoder)
        if dist_info.is_main:
            noted = source.notes["manifest"]
            others = f", which does not have {noted['not_in_it']} others" if noted["not_in_it"] else ""
            print(f"{source.name}: {noted['left_out']} of the {listed} training videos are left out, bad by {noted['file']}{others}", flush=True)
    if dist_info.is_main:
        for warning in source.warnings:
            print(printable(f"warning: {warning}"), flush=True)
    lists = {f"{split} videos": _fingerprint(getattr(source, split)) for split in ("train", "val", "test")}
    classes = {f"class {number}": name for number, name in enumerate(source.class_names)}
    comm.require_same({**lists, **classes}, of="videos or classes", remedy=f"{source.name} must be the same on all machines")
    return source


def _fingerprint(videos: Sequence[Video]) -> str:
    return f"{len(videos)} (crc {zlib.crc32(repr([(video.path, video.label) for video in videos]).encode(errors='surrogateescape')):08x})"


def require_videos(source: VideoSource, *splits: str) -> None:
    """Raise ValueError unless each of the splits has videos."""
    for split in splits:
        if not getattr(source, split):
            raise ValueError(f"dataset {source.name} has no {split} videos; set dataset.{split}")


def report_missing(source: VideoSource, folder: Path) -> None:
    """Print how many listed videos do not exist, and write their names to `missing_SPLIT.txt`."""
    for split, videos in source.missing.items():
        path = folder / f"missing_{split}.txt"
        path.unlink(missing_ok=True)
        if not videos:
            continue
        # File names need not be UTF-8; surrogateescape writes the bytes that were read.
        write_text(path, "".join(f"{video}\n" for video in videos), errors="surrogateescape")
        listed = len(videos) + source.notes["videos"][split]
        shown = ", ".join(videos[:3]) + (", ..." if len(videos) > 3 else "")
        line = f"{source.name}: {len(videos)} of the {listed} {split} videos are not there and left out ({shown}); {path} names them all"
        print(printable(line), flush=True)


def validates_on_test(source: VideoSource) -> bool:
    """Return whether the validation videos are the test videos, because the dataset has no validation list."""
    return source.notes.get("validation") == "test list"


def say_what_chooses_the_epoch(source: VideoSource, config: DictConfig, settings: TrainerSettings) -> None:
    """Print a line if the epoch is chosen on the test videos, which makes its accuracy optimistic."""
    if not validates_on_test(source) or settings.epochs <= settings.eval_every:
        return
    others = "set dataset.val=LIST to choose it on others, or " if "val" in config.dataset else ""
    last = f"trainer.eval_every={settings.epochs} to test the last epoch"
    print(f"validation: {source.name} has no validation list, so the test videos choose the best epoch; {others}{last}", flush=True)


def clip_settings(config: DictConfig) -> ClipSettings:
    """Return `dataset.clip`, with its values checked."""
    node = OmegaConf.create({"_target_": "atfr.data.clips.ClipSettings", **OmegaConf.to_container(config.dataset.clip, resolve=True)})
    return build(node, "dataset.clip")


def build_model(config: DictConfig, *, num_classes: int, dist_info: DistInfo, seed: int = 0) -> VideoNet:
    """Build the network of `model` on this rank's device, with weights drawn from the seed.

    Raises:
        ValueError: options do not fit, or the network cannot run on clips of `dataset.clip`.
    """
    if dist_info.is_main:
        warn_of_ignored(config)
    dropout = config.model.get("dropout", 0.0)
    if isinstance(dropout, (int, float)) and not 0 <= dropout < 1:
        raise ValueError(f"model.dropout must be at least 0 and below 1, not {dropout}")
    torch.manual_seed(seed)
    model: VideoNet = build(config.model, "model", num_classes=num_classes)
    try:
        model.check_clip(config.dataset.clip.frames, config.dataset.clip.crop_size, config.dataset.clip.crop_size)
    except ValueError as error:
        raise ValueError(f"dataset.clip.frames={config.dataset.clip.frames}, dataset.clip.crop_size={config.dataset.clip.crop_size}: {error}") from error
    return model.to(dist_info.device)


def load_given_weights(model: VideoNet, config: DictConfig, *, num_classes: int, dist_info: DistInfo, whole: bool) -> None:
    """Load the weights of `model.weights` or `init_from`, if one is set; rank 0 prints a report.

    Args:
        whole: require weights for every tensor except the sampling layers', because nothing is trained next.

    Raises:
        ValueError: weights are missing or do not fit.
    """
    given = weights_given(config)
    if given is None:
        return
    if given.published is not None:
        with comm.main_first(dist_info):
            given.published.download(key=given.option, progress=dist_info.is_main)
    report = load_pretrained(model, given.file, key=given.option)
    if dist_info.is_main:
        print(report.as_table(), flush=True)
        warn_of_normalisation(given, config)
    if whole and (untrained := [entry.name for entry in report.new if not entry.name.startswith("sgs.")]):
        raise ValueError(
            f"{given.option}={given.file} leaves {', '.join(untrained[:3])} untrained, and nothing is trained here: choose the network and the dataset"
            f" ({num_classes} classes now) that it was trained for"
        )


def check_batch_norm(model: VideoNet, clip: ClipSettings, settings: TrainerSettings, dist_info: DistInfo) -> None:
    """Raise ValueError if a rank trains on single clips that are too small for the statistics of batch norm."""
    if settings.sync_batch_norm and dist_info.world > 1:
        return
    shares = {settings.batch_size // dist_info.world, -(-settings.batch_size // dist_info.world)}
    if any(len(part) == 1 for share in shares for part in torch.empty(share).chunk(settings.accumulate)):
        model.check_training(clip.frames, clip.crop_size, clip.crop_size)


class Start(NamedTuple):
    """Where a network starts from: the option, the file, and the published weights if they are downloaded."""

    option: str
    file: Path
    published: Published | None = None


def weights_given(config: DictConfig) -> Start | None:
    """Return the weights to start from. A run folder means its best checkpoint.

    Raises:
        ValueError: both options are set, or there are no published weights of that name for this network.
    """
    weights, start = config.model.get("weights"), config.get("init_from")
    if weights is not None and start is not None:
        raise ValueError(f"model.weights={weights} and init_from={start} both say what to start from: set one of them to null")
    if weights is None and start is None:
        return None
    option, value = ("model.weights", str(weights)) if start is None else ("init_from", str(start))
    published = find_published(value, key=option)
    if published is not None:
        published.require_fit(network_name(config.model), key=option)
        return Start(option, published.file, published)
    return Start(option, weights_file(value, option))


def network_name(model: DictConfig) -> str | None:
    """Return the name that `create_model` has for the network of a config; None if it has none."""
    targets = {f"{build.__module__}.{build.__qualname__}": name for name, (build, _, _) in BACKBONES.items()}
    backbone = targets.get(model.get("_target_"))
    return None if backbone is None else full_name(backbone, str(model.size))


def warn_of_normalisation(start: Start, config: DictConfig) -> None:
    """Print a line if published weights were trained on clips with another normalisation."""
    clip, published = config.dataset.clip, start.published
    if published is not None and (tuple(clip.mean), tuple(clip.std)) != (published.mean, published.std):
        expected = f"dataset.clip.mean={list(published.mean)} dataset.clip.std={list(published.std)}".replace(", ", ",")
        print(f"warning: {published.name} was trained with {expected}", flush=True)


def weights_file(value: str, option: str) -> Path:
    """Return the file that an option names: the value, or the best checkpoint of a run folder.

    Raises:
        ValueError: the value is a folder without a best checkpoint; the message lists the checkpoints in it.
    """
    path = Path(str(value))
    if not path.is_dir():
        return path
    best = path / "checkpoints" / "best.pt"
    if not best.exists():
        others = [*sorted(path.glob("*.pt")), *sorted(path.glob("checkpoints/*.pt"))] or sorted(path.iterdir())
        listed = ", ".join(str(other.relative_to(path)) for other in others[:8]) + (", ..." if len(others) > 8 else "")
        raise ValueError(f"{option}={path} is a folder without checkpoints/best.pt; it holds {listed or 'nothing'}")
    return best


def gflops_table(model: VideoNet, clip: ClipSettings) -> GflopsTable:
    """Return the table of GFLOPs by B' for the clips of `dataset.clip`."""
    return model.gflops_table((3, clip.frames, clip.crop_size, clip.crop_size))


def check_budgets(model: VideoNet, clip: ClipSettings) -> None:
    """Raise ValueError if no clip is as cheap as a budget of the network's SGS layers."""
    options = next((layer.options for layer in model.sgs.values() if layer.options.follows_budget), None)  # the same for all layers
    for budget in () if options is None else (options.gflops, *(options.gflops_range or ())):
        if budget is not None:
            keep_ratio_for(gflops_table(model, clip), budget)


def train_batches(source: VideoSource, clip: ClipSettings, settings: TrainerSettings, dist_info: DistInfo) -> tuple[int, Callable[[int, int], Iterable[Any]]]:
    """Return the number of steps per epoch, and `batches(epoch, n)`: this rank's training batches of an epoch from the n-th on."""
    labels = [video.label for video in source.train] if settings.class_balanced else None
    sampler = TrainSampler(
        len(source.train), seed=settings.seed, global_batch=settings.batch_size, rank=dist_info.rank, world=dist_info.world, labels=labels
    )
    loader = train_loader(
        TrainClips(source.train, clip, seed=settings.seed),
        sampler=sampler,
        workers=settings.workers,
        timeout_s=settings.timeout_s,
        pin_memory=dist_info.device.type == "cuda",
    )

    def batches(epoch: int, start: int) -> Iterable[Any]:
        sampler.set_epoch(epoch, start)
        return loader

    def first_batches(epoch: int, start: int) -> Iterable[Any]:
        return islice(batches(0, start), steps - start)

    sampler.set_epoch(0)
    steps = min(len(sampler), settings.overfit_batches)
    return (steps, first_batches) if settings.overfit_batches else (len(sampler), batches)


def run_views(
    model: VideoNet, videos: Sequence[Video], clip: ClipSettings, *, views: int, crops: int, settings: TrainerSettings, dist_info: DistInfo, title: str, stop: StopFlag | None = None
) -> Evaluation:
    """Evaluate `views` x `crops` clips of each video on all ranks."""
    loader = test_loader(
        TestClips(videos, clip, views=views, crops=crops),
        batch_size=dist_info.share(settings.batch_size),
        rank=dist_info.rank,
        world=dist_info.world,
        workers=settings.workers,
        timeout_s=settings.timeout_s,
        pin_memory=dist_info.device.type == "cuda",
    )
    normalise = Normalizer(clip.mean, clip.std).to(dist_info.device)
    precision = precision_dtype(settings.precision, dist_info.device)
    return evaluate(model, loader, normalise=normalise, dist_info=dist_info, precision=precision, title=title, stop=stop)


def test_and_report(
    model: VideoNet,
    source: VideoSource,
    clip: ClipSettings,
    *,
    config: DictConfig,
    settings: TrainerSettings,
    dist_info: DistInfo,
    folder: Path,
    checkpoint: Path,
    stop: StopFlag | None = None,
) -> dict[str, Any] | None:
    """Test with all views, write `results.json`, `predictions.csv`, `test_config.yaml` and `examples/`, and print the table.

    Returns the results on rank 0.
    """
    evaluation = run_views(model, source.test, clip, views=clip.views, crops=clip.crops, settings=settings, dist_info=dist_info, title="test", stop=stop)
    if not dist_info.is_main:
        return None
    with stop.raises_immediately("during the test") if stop else nullcontext():
        table = gflops_table(model, clip)
        summary = metrics.summarise(evaluation, table, protocol=protocol(config, model, clip, source, settings, dist_info, checkpoint=checkpoint))
        metrics.write_results(summary, folder)
        metrics.write_predictions(evaluation, table, folder, class_names=source.class_names)
        write_text(folder / "test_config.yaml", OmegaConf.to_yaml(config, resolve=True))
    for video in evaluation.failed.values():
        print(printable(f"failed: {video.path}: {video.reason}"))
    print(metrics.as_table(summary, folder=folder), flush=True)
    with stop.raises_immediately("after the test") if stop else nullcontext(), or_warn(f"{folder} has no examples"):
        write_examples(
            model,
            evaluation.views,
            with_time_limit(TestClips(source.test, clip, views=clip.views, crops=clip.crops), timeout_s=settings.timeout_s),
            each=settings.examples,
            table=table,
            normalise=Normalizer(clip.mean, clip.std).to(dist_info.device),
            class_names=source.class_names,
            folder=folder,
            precision=precision_dtype(settings.precision, dist_info.device),
        )
    return summary


def protocol(
    config: DictConfig, model: VideoNet, clip: ClipSettings, source: VideoSource, settings: TrainerSettings, dist_info: DistInfo, *, checkpoint: Path
) -> dict[str, Any]:
    """Return what was tested and how, for `results.json`: every option that changes predictions."""
    return {
        **{field.name: getattr(clip, field.name) for field in fields(clip) if field.name not in NOT_OF_A_TEST},
        **({"stride": None} if clip.sampling == "segments" else {}),
        "dataset": source.name,
        "split": "test",
        "checkpoint": str(checkpoint),
        "model": {key: value for key, value in OmegaConf.to_container(config.model, resolve=True).items() if key not in ("clip", "clips")},
        "execution": model.execution,
        "compile": settings.compile,
        "precision": str(precision_dtype(settings.precision, dist_info.device)).removeprefix("torch."),
        "tf32": settings.tf32 and dist_info.device.type == "cuda",
        **source.notes,
    }
