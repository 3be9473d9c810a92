"""Print a network's parameters, dense GFLOPs and GFLOPs by B' for one clip.

    python tools/flops.py model=x3d_sgs model.size=M
    python tools/flops.py model=x3d_sgs dataset=synthetic json=true
"""

from __future__ import annotations

import json
import signal

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from atfr.cli import builders
from atfr.cli.config import check_root, program
from atfr.cli.recipe import is_given, with_recipe
from atfr.engine.distributed.comm import DistInfo
from atfr.models.flops import CONVENTION, GflopsTable


@program("flops")
def main(config: DictConfig) -> None:
    if is_given("dataset", HydraConfig.get().overrides.task):
        config, _ = with_recipe(config)  # the clip that a training on this dataset takes
    check_root(config)
    clip = builders.clip_settings(config)
    classes = 400 if config.num_classes is None else config.num_classes
    if not isinstance(classes, int) or classes < 1:
        raise ValueError(f"num_classes must be at least 1, or null, not {classes}")
    model = builders.build_model(config, num_classes=classes, dist_info=DistInfo(0, 1, torch.device("cpu")))
    table = builders.gflops_table(model, clip)
    params = sum(parameter.numel() for parameter in model.parameters())
    by_bins = {"/".join(map(str, bins)): table.at(bins) for bins in ladder(table)}
    if config.json:
        print(json.dumps({"params": params, "dense_gflops": table.dense, "gflops_by_bins": by_bins}))
        return
    print(f"clip          {clip.frames} frames, {clip.crop_size} x {clip.crop_size}")
    print(f"parameters    {params:,} ({classes} classes)")
    print(f"dense GFLOPs  {table.dense:.4f}")
    for bins, cost in by_bins.items():
        print(f"B' = {bins:<5}      {cost:.4f}  ({cost / table.dense:.0%} of dense)")
    print(CONVENTION)


def ladder(table: GflopsTable) -> list[tuple[int, ...]]:
    """Return every B' from the least to the most; several layers rise together, in proportion."""
    steps = max((most - least for most, least in zip(table.most, table.least)), default=-1)
    return [
        tuple(least + (most - least) * i // max(steps, 1) for most, least in zip(table.most, table.least)) for i in range(steps + 1)
    ]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # there is nothing to save
    main()
