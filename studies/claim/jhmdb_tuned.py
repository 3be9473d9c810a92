"""JHMDB with the last blocks of the Kinetics I3D trained: do layers that may adapt make up for what a frozen network loses?

    python studies/claim/jhmdb_tuned.py                              # all methods; those in jhmdb_tuned.csv are not run again
    python studies/claim/jhmdb_tuned.py --kept 16 --methods stride atfr --seeds 0

As jhmdb.py, with frames sampled at the input. The layers up to Mixed_4f stay frozen, and run once a method. Mixed_5b, Mixed_5c and a new
classifier are trained on what they give: three folds by source video, 928 predictions. Writes the rows of studies/claim/jhmdb_tuned.csv
and the table in studies/claim/README.md.
"""

from __future__ import annotations

import argparse
import copy
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from claim_report import fill, paired_table
from claim_rows import Predictions, read_folds, saved_predictions, write_rows
from jhmdb import (
    BATCH,
    DENSE,
    KEPT,
    METHODS,
    ROOT,
    Clips,
    calibrate,
    decided,
    in_digits,
    kinetics_weights,
    mean_cost,
    network,
    normalised,
    options_of,
    read_clips,
)
from torch import Tensor, nn

from atfr.models.sgs.sampling import sample
from atfr.models.video_net import VideoNet
from atfr.utils.progress import watched

ROWS = Path("studies/claim/jhmdb_tuned.csv")
TRAINED = ("mixed_5b", "mixed_5c")
EPOCHS, BATCH_SIZE, RATE, CLASSIFIER_RATE, DROPOUT = 20, 16, 1e-4, 1e-3, 0.5


@dataclass(frozen=True)
class Features:
    """What the frozen layers make of the frames that a method keeps."""

    of_clips: list[Tensor]  # float16 [C, T', H, W]: T' of each clip follows from its B'
    bins: float  # mean B'
    gflops: float  # mean, of dense


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, default=Path("../shared/data/videos/jhmdb"), help="folder with the videos and folds.csv (default: %(default)s)")
    parser.add_argument("--kept", nargs="+", type=int, default=list(KEPT["input"]), choices=KEPT["input"], help="frames that the fixed methods keep of 32")
    parser.add_argument("--methods", nargs="+", default=["uniform", "stride", "reference", "atfr", "atfr-middle"], choices=[name for name in METHODS if "glance" not in name])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    arguments = parser.parse_args()
    os.chdir(ROOT)
    videos = read_folds(arguments.clips, way_out="--clips names the folder of JHMDB's videos with that list")
    weights, data, rows = kinetics_weights(), read_clips(arguments.clips, videos), saved_predictions(ROWS)
    for job in (DENSE, *(("input", method, kept) for kept in arguments.kept for method in arguments.methods)):
        missing = [seed for seed in arguments.seeds if (*job, seed) not in rows]
        if not missing:
            continue
        model = network(weights, options_of(*job, at="input"))
        features = frozen_features(model, data, *job)
        for seed in missing:
            hits = predictions(model.dense_network, features.of_clips, data, seed) == data.labels
            row = Predictions(*job, seed, features.bins, 1.0 if job == DENSE else features.gflops, in_digits(hits))
            rows[row.key] = row
            write_rows(ROWS, Predictions, list(rows.values()))
    text = paired_table(list(rows.values()), data.groups)
    fill(Path("studies/claim/README.md"), "jhmdb_tuned", text, script="jhmdb_tuned.py")
    print(text)


@torch.inference_mode()
def frozen_features(model: VideoNet, data: Clips, location: str, method: str, kept: int) -> Features:
    """Calibrate the layer, and run each clip alone: its sampled frames through the layers in front of Mixed_5b."""
    (layer,) = model.sgs.values()
    calibrate(layer, (layer(normalised(clips)) for clips in data.clips.split(BATCH)[::7]))
    names = [name for name, _ in model.dense_network.named_children()]
    front = nn.Sequential(*list(model.dense_network.children())[: names.index(TRAINED[0])])
    features, bins = [], []
    for clip in watched(data.clips.split(1), f"{location} {method} {kept}", unit="clip"):
        x = normalised(clip).contiguous(memory_format=torch.channels_last_3d)
        (frames,), (done,) = sample([layer], [x], [None], decision=decided(layer, method, x, x))
        features.append(front(frames)[0].half())
        bins.append(done.segments.lengths)
    return Features(features, float(np.mean(bins)), mean_cost(model, data, bins))


def predictions(network: nn.Module, features: list[Tensor], data: Clips, seed: int) -> Tensor:
    """Predict each fold by blocks that were trained on the other two -> classes [N]."""
    found = torch.empty_like(data.labels)
    for fold in data.folds.unique():
        torch.manual_seed(seed)
        blocks = copy.deepcopy(nn.Sequential(*(network.get_submodule(name) for name in TRAINED)))
        classifier = nn.Linear(network.head.in_features, int(data.labels.max()) + 1)
        train(blocks, classifier, features, data.labels, (data.folds != fold).nonzero()[:, 0])
        tested = (data.folds == fold).nonzero()[:, 0]
        with torch.inference_mode():
            found[tested] = torch.cat([logits(blocks, classifier, features, batch).argmax(dim=1) for batch in tested.split(BATCH_SIZE)])
    return found


def train(blocks: nn.Module, classifier: nn.Module, features: list[Tensor], labels: Tensor, clips: Tensor) -> None:
    """Train on these clips. Batch norm keeps its Kinetics statistics, so that a clip's logits depend on nothing else."""
    groups = [{"params": blocks.parameters(), "lr": RATE}, {"params": classifier.parameters(), "lr": CLASSIFIER_RATE}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in watched(range(EPOCHS), "training", unit="epoch"):
        for batch in clips[torch.randperm(len(clips))].split(BATCH_SIZE):
            loss = nn.functional.cross_entropy(logits(blocks, classifier, features, batch, dropout=DROPOUT), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()


def logits(blocks: nn.Module, classifier: nn.Module, features: list[Tensor], clips: Tensor, *, dropout: float = 0.0) -> Tensor:
    """The logits of these clips [n, classes]; clips of equal length run together."""
    lengths = torch.tensor([features[clip].shape[1] for clip in clips])
    order, pooled = [], []
    for length in lengths.unique():
        chosen = (lengths == length).nonzero()[:, 0]
        x = torch.stack([features[clip].float() for clip in clips[chosen]])  # [n, C, T', H, W]
        pooled.append(blocks(x).mean(dim=(2, 3, 4)))
        order.append(chosen)
    return classifier(nn.functional.dropout(torch.cat(pooled)[torch.cat(order).argsort()], dropout))


if __name__ == "__main__":
    main()
