"""The table of training recipes in docs/recipes.md, from the files of configs/experiment.

    python scripts/recipes.py --output docs/recipes.md

A recipe is a file with a line `# Source: ...`. Each is composed with the network and the dataset that it names itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from atfr.cli.recipe import CONFIGS, recipes

COLUMNS = ("`experiment=`", "network", "from", "clip", "batch", "rate", "epochs", "warm-up", "schedule", "decay", "views x crops", "source")
TEXT = """# Training recipes

Made by `python scripts/recipes.py --output docs/recipes.md` from `configs/experiment/`, where each value has its source beside it.

```
python tools/train.py dataset=kinetics400 model=slowfast dataset.root=/data/k400            # experiment=slowfast/kinetics400, as published
python tools/train.py dataset=kinetics400 model=slowfast_sgs dataset.root=...               # the same with SGS
python tools/train.py experiment=base/pyslowfast model=i3d dataset=kinetics600 ...          # a recipe of one's own choice
python tools/train.py -m dataset=ucf101 model=x3d_sgs model.weights=X3D_S.pyth dataset.split=1,2,3
```

Without `experiment=` the recipe NETWORK/DATASET_SIZE or NETWORK/DATASET runs. Where there is none: on another Kinetics set that of
Kinetics-400, on UCF101 and HMDB51 finetune/DATASET, on Something-Something base/pyslowfast_ssv2. Recipes that start from
Kinetics weights run with `model.weights=FILE` or `init_from=RUN`; without these the network's recipe for Kinetics-400 runs, from scratch.
`optimizer=` or `schedule=` on the command line replaces the recipe's, with all of its options.

Warm-up and milestones are in epochs here, and shares of all steps in the files, so `trainer.epochs=100` stretches all of them. The rate is
for the global batch beside it. With another batch, scale it alike (Goyal et al., 2017): with `trainer.batch_size=32` where 64 goes with
0.1, `optimizer.lr=0.05`; `trainer.accumulate` keeps a batch that is too large for the memory. Batch norm sees what one process has of
it at a time, and with `trainer.sync_batch_norm=true`, as in torchvision's recipes, what all have. All train with SGD and momentum 0.9,
and plain cross entropy.

"""
NOTES = """
What differs from the sources, everywhere:

- Biases and norms have no weight decay. In PySlowFast biases do, in torchvision and MMAction2 all parameters do.
- An epoch is one clip of each video. Where a source's epoch has more, `epochs` has as many clips as its run.
- The crops of a test are as large as those in training. PySlowFast and MMAction2 crop the whole short side.
- Precise batch norm (PySlowFast's has 200 batches a GPU) takes `trainer.statistics_clips` clips, also where a source has running averages.
- Frames keep their aspect ratio. Torchvision and VMZ resize to 128 x 171, torchvision's S3D to 256 x 256.
- `trainer.precision` is left at `auto`.

The sources: [PySlowFast](https://github.com/facebookresearch/SlowFast), whose files also made pytorchvideo's model zoo;
[torchvision](https://github.com/pytorch/vision); [MMAction2](https://github.com/open-mmlab/mmaction2);
[VMZ](https://github.com/facebookresearch/VMZ); SGS is the [release](https://github.com/SimilarityGuidedSampling/Similarity-Guided-Sampling)
of its paper's authors, which has no file for X3D, R(2+1)D, Something-Something, UCF101 or HMDB51. For networks and datasets that are not in
the table no recipe was published, or none was found.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="Markdown file to write")
    parser.parse_args().output.write_text(document(), encoding="utf-8")


def document() -> str:
    """The whole of docs/recipes.md."""
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *(row(name, source) for name, source in recipes().items())]
    return TEXT + "".join(f"| {' | '.join(cells)} |\n" for cells in rows) + NOTES


def row(name: str, source: str) -> tuple[str, ...]:
    config, network = _composed(name)
    clip, trainer = config.dataset.clip, config.trainer
    any_network = name.startswith("finetune/")
    if clip.sampling == "segments":
        length = f"{clip.frames} segments"
    else:
        length = f"{clip.frames} x {clip.stride}" + (f" at {clip.fps}/s" if clip.fps else "")
    return (
        f"`{name}`",
        "any" if any_network else f"{network} {config.model.size}",
        "scratch" if config.model.weights is None else "weights",
        "the network's" if any_network else f"{length}, {clip.crop_size}",
        str(trainer.batch_size),
        f"{config.optimizer.lr:g}",
        str(trainer.epochs),
        f"{config.schedule.warmup * trainer.epochs:.0f}",
        _schedule(config),
        f"{config.optimizer.weight_decay:g}",
        f"{clip.views} x {clip.crops}",
        source,
    )


def _composed(name: str) -> tuple[DictConfig, str]:
    """A recipe's config, and the name of its network."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", [f"experiment={name}"], return_hydra_config=True)
    return config, config.hydra.runtime.choices["model"]


def _schedule(config: DictConfig) -> str:
    schedule, epochs = config.schedule, config.trainer.epochs
    if "every" in schedule:
        return f"x {schedule.gamma} every {schedule.every * epochs:.1f}".removesuffix(".0")
    if "milestones" in schedule:
        return f"x {schedule.gamma} at " + ", ".join(f"{share * epochs:.0f}" for share in schedule.milestones)
    return "cosine"


if __name__ == "__main__":
    main()
