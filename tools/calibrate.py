"""Put SGS into a trained network without training it, and measure its accuracy at several budgets.

    python tools/calibrate.py checkpoint=runs/default budgets=[0.3,0.5,0.8]    # a network that tools/train.py trained with SGS
    python tools/calibrate.py model=x3d_sgs model.weights=X3D_S.pyth dataset=kinetics400 dataset.root=/data/k400
    python tools/calibrate.py ... model/sgs=uniform              # a baseline at the same GFLOPs

For each budget (mean GFLOPs of a clip over those of the dense network) this calibrates the SGS layers on
`trainer.statistics_clips` training clips and runs the test videos. It writes calibration.json, a list with one entry
per budget, and a checkpoint per budget, checkpoints/budget-B.pt, for tools/test.py and tools/export.py, into
trainer.output_dir, CHECKPOINT'S RUN FOLDER/calibrated, or a folder in runs/calibrated. With checkpoint=, network, dataset and
clip are those that it was trained with, changed by overrides.
Run the same command again to continue a calibration that was stopped.
"""

from __future__ import annotations

from atfr.engine.distributed.preemption import listen

if __name__ == "__main__":
    listen()  # before the imports, which take seconds

# ruff: noqa: E402
import json
from functools import partial
from pathlib import Path
from typing import Any, Iterator

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from atfr.cli import builders, from_checkpoint
from atfr.cli.command.run_name import run_folder
from atfr.cli.config import build, check_root, choices, program
from atfr.cli.launch import on_every_process
from atfr.cli.recipe import Announcement, require_weights, say, with_recipe
from atfr.data.transforms import Normalizer
from atfr.data.types import VideoSource
from atfr.engine import metrics
from atfr.engine.budgets import keep_ratio_for
from atfr.engine.calibration import calibrate_layers, clips_for_statistics, mean_share, refresh_statistics
from atfr.engine.distributed import comm
from atfr.engine.run import checkpoint
from atfr.engine.run.contents import contents, require_same_contents
from atfr.engine.run.run_dir import claim_folder
from atfr.engine.settings import TrainerSettings
from atfr.models.sgs.glance import GlanceEmbedding
from atfr.models.video_net import VideoNet
from atfr.utils.atomic_io import write_text


@program("calibrate", arguments=from_checkpoint.like_the_checkpoint)
def main(config: DictConfig) -> None:
    budgets, recipe, folder = OmegaConf.to_container(config).get("budgets"), Announcement(), None
    if config.checkpoint is None:
        config, recipe = with_recipe(config)
        require_weights(config)
    else:
        config, folder = of_checkpoint(config)
    check_root(config)
    settings: TrainerSettings = build(config.trainer, "trainer")
    if not isinstance(budgets, list) or not budgets or not all(isinstance(budget, (int, float)) and 0 < budget <= 1 for budget in budgets):
        raise ValueError(f"budgets={budgets} must be shares of the dense GFLOPs, above 0 and at most 1, in a list such as [0.4,0.6]")
    budgets = list(dict.fromkeys(map(float, budgets)))
    if builders.weights_given(config) is None:
        raise ValueError("set checkpoint to a run of tools/train.py, or model.weights or init_from to other weights, that SGS is put into")
    folder, stop = folder or run_folder(settings.output_dir, under="calibrated"), listen()
    work = partial(calibrate_and_test, config, settings, budgets=budgets, folder=folder, recipe=recipe)
    on_every_process(work, config, settings, program=__file__, folder=folder, alone=True, stop=stop, where="in the calibration")


def of_checkpoint(composed: DictConfig) -> tuple[DictConfig, Path]:
    """Return the config of the checkpoint, which starts from its weights, and the folder for the results."""
    path = from_checkpoint.checkpoint_file(composed.checkpoint)
    state = from_checkpoint.read(path)
    folder = from_checkpoint.results_folder(path, composed.trainer.output_dir)
    config = from_checkpoint.with_overrides(state, composed, trains=True)
    OmegaConf.update(config, "init_from", str(path), force_add=True)
    config.model.weights, config.trainer.output_dir = None, composed.trainer.output_dir
    for key in ("budgets", "refresh_batch_norm", "checkpoint"):
        OmegaConf.update(config, key, composed[key], force_add=True)
    return config, folder / "calibrated" if composed.trainer.output_dir is None else folder


def calibrate_and_test(config: DictConfig, settings: TrainerSettings, dist_info: comm.DistInfo, budgets: list[float], folder: Path, recipe: Announcement) -> None:
    """Calibrate and test at each budget that is not in calibration.json, on this rank."""
    if dist_info.is_main:
        say(recipe.before[:1])  # only the recipe's clip and views are used here
        if config.checkpoint is None and config.init_from is not None and Path(config.init_from).is_dir():
            say([f"init_from takes the weights alone; checkpoint={config.init_from} takes the network, the dataset and the clip that they were trained with, too"])
    clip, source = builders.clip_settings(config), builders.load_source(config, dist_info, make=False)
    builders.require_videos(source, "train", "test")
    num_classes = len(source.class_names)
    model = builders.build_model(config, num_classes=num_classes, dist_info=dist_info, seed=settings.seed)
    builders.load_given_weights(model, config, num_classes=num_classes, dist_info=dist_info, whole=True)
    chosen = chosen_groups(config)
    require_budgets(model, chosen["model"])
    path = folder / "calibration.json"
    done = {entry["budget"]: entry for entry in json.loads(path.read_text())} if path.exists() else {}
    start = builders.weights_given(config)
    files = contents(source, start and start.file)
    for entry in done.values():
        require_same_contents(entry.get("contents", files), files, of=path, way_out="choose another trainer.output_dir", warn=dist_info.is_main)
    if config.checkpoint is not None:
        from_checkpoint.require_classes(source, from_checkpoint.read(start.file), start.file)
    missing = [budget for budget in budgets if budget not in done]
    table = builders.gflops_table(model, clip) if missing else None
    for budget in missing:
        keep_ratio_for(table, budget)  # raises for a budget that cannot be met, before the work begins
    plain = OmegaConf.to_container(config, resolve=True)
    del plain["budgets"], plain["checkpoint"]  # more budgets of the same network belong to the same experiment
    if dist_info.is_main:
        claim_folder(folder, plain, "calibration", resume=settings.resume)
        builders.report_missing(source, folder)
    comm.barrier()
    clips = clips_for_statistics(builders.train_batches(source, clip, settings, dist_info)[1](0, 0), settings) if missing else []
    number = int(comm.summed(torch.tensor(float(sum(map(len, clips))), device=dist_info.device)).item())
    if dist_info.is_main and missing:
        print(f"calibrating on {number} training clips", flush=True)
    normalise = Normalizer(clip.mean, clip.std).to(dist_info.device)
    calibrate = refresh_statistics if config.refresh_batch_norm else calibrate_layers

    def normalised() -> Iterator[Tensor]:
        return (normalise(batch.to(dist_info.device)) for batch in clips)

    for budget in budgets:
        if budget in missing:
            calibrate(model, normalised, gflops=budget)
            share = mean_share(model, normalised())
            evaluation = builders.run_views(
                model, source.test, clip, views=clip.views, crops=clip.crops, settings=settings, dist_info=dist_info, title=f"budget {budget:g}"
            )
            saved = folder / "checkpoints" / f"budget-{budget:g}.pt"
            protocol = builders.protocol(config, model, clip, source, settings, dist_info, checkpoint=saved)
            with comm.main_first(dist_info):  # counting GFLOPs may take long, and the other ranks wait
                if dist_info.is_main:
                    done[budget] = {"budget": budget, "training_clips_gflops": share, "contents": files, **metrics.summarise(evaluation, table, protocol=protocol)}
                    checkpoint.save(state_of(model, plain, budget, source, chosen), saved)
                    write_text(path, json.dumps([done[key] for key in sorted(done)], indent=2) + "\n")
        if dist_info.is_main:
            print(as_line(done[budget]), flush=True)
    if dist_info.is_main:
        print(f"saved {path} and {folder / 'checkpoints'}/budget-B.pt", flush=True)


def chosen_groups(config: DictConfig) -> dict[str, str]:
    """Return the choices of config groups. In a sweep over checkpoints hydra knows those on the command line alone."""
    if config.checkpoint is None:
        return choices()
    given = from_checkpoint.given_overrides(HydraConfig.get().overrides.task)
    own = from_checkpoint.read(from_checkpoint.checkpoint_file(config.checkpoint))["choices"]
    return {**own, **{group: choice for group, choice in choices().items() if group in given or group.partition("/")[0] in given}}


def require_budgets(model: VideoNet, name: str) -> None:
    """Raise ValueError, before the work begins, unless all layers follow a budget."""
    if not model.sgs:
        way_out = "leave out model/sgs=off" if name.endswith("_sgs") else f"add model={name}_sgs"
        raise ValueError(f"model={name} has no SGS layer to calibrate: {way_out}")
    for layer in model.sgs.values():
        layer.set_budget(1.0)  # raises for a layer that follows none
        if isinstance(layer.embedding, GlanceEmbedding) and not layer.embedding.steps:
            raise ValueError("model/sgs=glance has to be trained with the network (tools/train.py): these weights hold no embedding that learned; use model/sgs=atfr")


def state_of(model: VideoNet, plain: dict[str, Any], budget: float, source: VideoSource, chosen: dict[str, str]) -> dict[str, Any]:
    """Return what tools/test.py needs to run the network as it is calibrated now."""
    sgs = {**plain["model"]["sgs"], "gflops": budget, "keep_ratio": None}
    config = {**plain, "init_from": None, "model": {**plain["model"], "weights": None, "sgs": sgs}}
    return {"model": model.state_dict(), "config": config, "choices": chosen, "class_names": list(source.class_names)}


def as_line(entry: dict[str, Any]) -> str:
    gflops, bins = entry["gflops"], entry["bins"]
    trained = f" ({entry['training_clips_gflops']:.3f} on the training clips)" if "training_clips_gflops" in entry else ""
    share = gflops["mean"] / gflops["dense"]
    above = "; above the budget: these videos change more than the training clips, or there were too few of them" if share > entry["budget"] + 0.05 else ""
    return (
        f"budget {entry['budget']:.2f}: top-1 {entry['top1']:.2f} %, GFLOPs {share:.3f} of dense{trained},"
        f" B' mean {bins['mean']:.2f}, min {bins['min']}, max {bins['max']} of {bins['frames']}{above}"
    )


if __name__ == "__main__":
    main()
