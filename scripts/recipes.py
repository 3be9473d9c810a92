"""The table of training recipes in docs/recipes.md, from the files of configs/experiment.

    python scripts/recipes.py --output docs/recipes.md

A recipe is a file with a line `# Source: ...`. Each is composed with the network and the dataset that it names.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from atfr.cli.recipe import CONFIGS, recipes
from atfr.models.factory import model_names
from atfr.models.pretrained.published import FITS

COLUMNS = ("`experiment=`", "network", "from", "clip", "batch", "rate", "epochs", "warm-up", "schedule", "decay", "views x crops", "source")
TEXT = """# Training recipes

`python scripts/recipes.py --output docs/recipes.md` makes this page from `configs/experiment/`, where the source of each value is beside it.

## Choose a recipe

```bash
python tools/train.py dataset=kinetics400 model=slowfast dataset.root=/data/k400        # experiment=slowfast/kinetics400, as published
python tools/train.py dataset=kinetics400 model=slowfast_sgs dataset.root=/data/k400    # the same with SGS
python tools/train.py experiment=base/pyslowfast model=i3d dataset=kinetics600 dataset.root=/data/k600    # a recipe of your choice
python tools/train.py experiment=base/pyslowfast dataset=videolist model=x3d_sgs dataset.root=DIR dataset.train=train.csv dataset.test=test.csv
python tools/train.py dataset=ucf101 model=x3d_sgs model.weights=pytorchvideo:x3d_s dataset.root=/data/ucf101             # fine-tuning, with a download
python tools/train.py -m dataset=ucf101 model=x3d_sgs model.weights=X3D_S.pyth dataset.split=1,2,3
```

A command that chooses a dataset and no `experiment` uses the recipe NETWORK/DATASET_SIZE or NETWORK/DATASET, and prints it. Where none was
published, it uses the nearest:

- on another Kinetics dataset, the recipe for Kinetics-400;
- on UCF101 and HMDB51, finetune/DATASET;
- on Something-Something, base/pyslowfast_ssv2;
- otherwise, base/pyslowfast.

A recipe that starts from Kinetics weights needs `model.weights` or `init_from=RUN`. Without these the network's recipe for Kinetics-400 is
used, from scratch. Options on the command line win over the recipe; `optimizer=` or `schedule=` replaces the whole group, and `~experiment`
leaves the recipe out.

## Published weights

`model.weights` takes a file, or the name of weights that are downloaded once:

WEIGHTS

Weights of another network are refused with the names that fit. Without a connection the error names the URL and the file to copy it to, in the
folder of torch.hub (`~/.cache/torch/hub/checkpoints`, or in `$TORCH_HOME`). The classifier is loaded if the dataset has 400 classes: those of
Kinetics-400 in alphabetical order, which are `torchvision.models.video.R3D_18_Weights.DEFAULT.meta["categories"]`. Otherwise it is replaced.
The weights of torchvision expect another normalisation than the default; a warning prints the options. In Python:
`atfr.create_model("r3d_18", weights="torchvision:r3d_18")`.

## Change the batch or the number of epochs

The table gives warm-up and milestones in epochs. The files give them as fractions of all steps, so `trainer.epochs=100` scales them. The
learning rate belongs to the global batch beside it; with another batch, scale it linearly (Goyal et al., 2017): `optimizer.lr=0.05` with
`trainer.batch_size=32` where the table has 0.1 and 64. `trainer.accumulate` keeps a batch that does not fit into memory. Batch norm uses the
clips that one process runs at a time, or those of all processes with `trainer.sync_batch_norm=true`, as in the recipes of torchvision.

All recipes use SGD with momentum 0.9 and cross entropy.

## The recipes

"""
NOTES = """
## Differences from the sources

- Biases and norms have no weight decay. In PySlowFast biases have it; in torchvision and MMAction2 all parameters do.
- An epoch is one clip of each video. Where an epoch of the source has more, `epochs` is larger, so that the number of clips is the same.
- Test crops have the size of training crops. PySlowFast and MMAction2 crop the whole short side.
- Precise batch norm uses `trainer.statistics_clips` clips (in PySlowFast 200 batches on each GPU), also where a source has running averages.
- Frames keep their aspect ratio. torchvision and VMZ resize to 128 x 171, S3D of torchvision to 256 x 256.
- `trainer.precision` is `auto`.

Sources: [PySlowFast](https://github.com/facebookresearch/SlowFast), whose files also made the model zoo of pytorchvideo;
[torchvision](https://github.com/pytorch/vision); [MMAction2](https://github.com/open-mmlab/mmaction2);
[VMZ](https://github.com/facebookresearch/VMZ). SGS is the
[release](https://github.com/SimilarityGuidedSampling/Similarity-Guided-Sampling) of the authors of the paper, which has no file for X3D, R(2+1)D,
Something-Something, UCF101 or HMDB51. For other networks and datasets no published recipe was found.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="Markdown file to write")
    parser.parse_args().output.write_text(document(), encoding="utf-8")


def document() -> str:
    """Return the text of docs/recipes.md."""
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *(row(name, source) for name, source in recipes().items())]
    return TEXT.replace("WEIGHTS\n", weights_table(), 1) + "".join(f"| {' | '.join(cells)} |\n" for cells in rows) + NOTES


def weights_table() -> str:
    """Return the table of published weights: the networks that have the same parameters, and the weights of these."""
    names: dict[tuple[str, ...], list[str]] = {}
    for name, networks in FITS.items():
        names.setdefault(tuple(f"{backbone} {size}" for backbone, size in map(model_names().__getitem__, networks)), []).append(f"`{name}`")
    rows = [("network, size", "`model.weights=`"), ("---", "---"), *((", ".join(networks), ", ".join(those)) for networks, those in names.items())]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


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
    """Compose a recipe; return the config and the name of its network."""
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
