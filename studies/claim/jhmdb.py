"""JHMDB with the frozen Kinetics I3D: what are the features worth that each method keeps?

    python studies/claim/jhmdb.py                            # all methods; those in jhmdb.csv are not run again
    python studies/claim/jhmdb.py --locations res3 --methods uniform atfr-middle

Nothing of the network is trained. Each method samples the features of all 928 clips (32 frames, 112 x 112) at a location, the
rest of I3D runs on what is kept, and its last features, averaged, are classified by logistic regression: three folds by source
video, 928 predictions. Standard errors are over the 297 sources. The bin width is calibrated on every seventh clip, without labels.
The embedding of `glance` learns from the labels of the other two folds, so all clips are sampled once for each fold.
Writes the rows of studies/claim/jhmdb.csv and the table in studies/claim/README.md.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from claim_report import fill, paired, paired_table
from claim_rows import Predictions, groups_of, read_folds, saved_predictions, write_rows
from torch import Tensor, nn

from atfr.data.video.decode import read_clip
from atfr.models.factory import create_model
from atfr.models.sgs.config import PRESETS, SGSConfig
from atfr.models.sgs.fixed import uniform_weights
from atfr.models.sgs.functional import is_middle
from atfr.models.sgs.glance import SHORT, GlanceEmbedding
from atfr.models.sgs.layer import SGS, Proposal
from atfr.models.sgs.sampling import Decision, decide
from atfr.models.video_net import VideoNet
from atfr.utils.progress import watched

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
from fetch_weights import checkpoint_of_i3d  # noqa: E402

ROWS = Path("studies/claim/jhmdb.csv")
FRAMES, SIDE, BATCH = 32, 112, 8
EPOCHS, BATCH_SIZE, RATE, DECAY = 40, 16, 2e-3, 0.05  # of the embedding of `glance`; not searched
PENALTY = 100.0  # of the squared weights of the regression, for 620 clips; 10 to 1000 differ by less than 1.5 points for the dense network
KEPT = {"input": (16, 11), "stem": (5, 2), "res3": (8,)}  # features that the fixed methods keep; about .5 and .38 of the GFLOPs, but for res3
NUMBERS = range(2, 10)  # of features behind the stem; nearly all clips keep so many where the mean is 5
DENSE = ("", "dense", 0)  # the location, method and budget of the network that keeps every feature
ATFR = PRESETS["atfr"]
FEATURES = replace(ATFR, embed_from="features", grid=1)
METHODS = {
    "uniform": PRESETS["uniform"],
    "stride": PRESETS["stride"],
    "reference": replace(PRESETS["frozen"], before_activation=False),
    "atfr": ATFR,
    "atfr-middle": replace(ATFR, kernel="middle"),
    "atfr-equal": ATFR,
    "atfr-middle-equal": replace(ATFR, kernel="middle"),
    "glance": PRESETS["glance"],
    "glance-equal": PRESETS["glance"],
    "uniform-as-many": ATFR,  # as many features of each clip as `atfr` keeps, from equal parts
    "stride-as-many": replace(ATFR, kernel="middle"),
    "features": FEATURES,
    "features-middle": replace(FEATURES, kernel="middle"),
    "features-middle-equal": replace(FEATURES, kernel="middle"),
}  # fmt: skip


@dataclass(frozen=True)
class Clips:
    """The set of videos, decoded."""

    clips: Tensor  # uint8 [N, 3, T, H, W]
    labels: Tensor  # [N]
    folds: Tensor  # [N]
    groups: np.ndarray  # [N] the source of each video


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, default=Path("../shared/data/videos/jhmdb"), help="folder with the videos and folds.csv (default: %(default)s)")
    parser.add_argument("--locations", nargs="+", default=list(KEPT), choices=KEPT)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--kept", nargs="+", type=int, help="features that the fixed methods keep (default: about .5 and .38 of the GFLOPs)")
    parser.add_argument("--again", action="store_true", help="also run what is in jhmdb.csv")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    videos = read_folds(arguments.clips, way_out="--clips names the folder of JHMDB's videos with that list")
    weights, data, rows = kinetics_weights(), read_clips(arguments.clips, videos), saved_predictions(ROWS)
    for location in arguments.locations:
        jobs = [(location, method, kept) for kept in arguments.kept or KEPT[location] for method in arguments.methods]
        missing = [job for job in (DENSE, *jobs) if arguments.again or (*job, 0) not in rows]
        before = features_before(network(weights, options_of(*DENSE, at=location)), data) if missing else []
        for where, method, kept in missing:
            rows[where, method, kept, 0] = run(network(weights, options_of(where, method, kept, at=location)), before, data, where, method, kept)
            write_rows(ROWS, Predictions, list(rows.values()))
    text = paired_table(list(rows.values()), data.groups)
    fill(Path("studies/claim/README.md"), "jhmdb", text, script="jhmdb.py")
    print(text)
    hits = {kept: row.hits for (where, method, kept, _), row in rows.items() if (where, method) == ("stem", "stride")}
    if hits.keys() >= {*NUMBERS}:
        text = table_of_numbers(hits, numbers_kept(network(weights, options_of("stem", "atfr", KEPT["stem"][0], at="stem")), data), data.groups)
        fill(Path("studies/claim/README.md"), "jhmdb_numbers", text, script="jhmdb.py")
        print(text)


def kinetics_weights() -> dict[str, Tensor]:
    """The weights of I3D, which are fetched where they are not there yet."""
    return torch.load(checkpoint_of_i3d(), map_location="cpu", weights_only=False)["model"]


def options_of(location: str, method: str, kept: int, *, at: str) -> SGSConfig:
    """The layer, at the location `at`, of a method that keeps `kept` features on average, or of every clip."""
    if (location, method, kept) == DENSE:
        return replace(PRESETS["identity"], after=at)
    options, frames = METHODS[method], FRAMES if location == "input" else FRAMES // 2
    if options.is_baseline:
        return replace(options, after=location, num_bins=kept, gflops=None)
    if method == "reference":  # which fills about 5 of 8 bins
        return replace(options, after=location, num_bins=min(frames, round(1.6 * kept)))
    if method.endswith("equal"):
        return replace(options, after=location, num_bins=kept, same_number=True)
    return replace(options, after=location, keep_ratio=kept / frames, gflops=None)


def network(weights: dict[str, Tensor], options: SGSConfig) -> VideoNet:
    """I3D with its Kinetics weights."""
    torch.manual_seed(0)  # of the reference's embedding
    model = create_model("i3d_inception", 400, sgs=options)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.startswith("sgs.") for name in missing)
    return model.eval()


def read_clips(folder: Path, videos: list[dict[str, str]]) -> Clips:
    """Decode the middle 32 frames of each video; the last frame of a shorter one is repeated."""
    names = sorted({video["label"] for video in videos})
    clips = torch.empty(len(videos), 3, FRAMES, SIDE, SIDE, dtype=torch.uint8)
    for video, clip in zip(watched(videos, "reading", unit="video"), clips):
        frames = read_clip(str(folder / video["relative_path"]), lambda count, fps: np.clip(max((count - FRAMES) // 2, 0) + np.arange(FRAMES), 0, count - 1), short_side=SIDE).frames
        top, left = ((size - SIDE) // 2 for size in frames.shape[1:3])
        clip.copy_(torch.from_numpy(frames[:, top : top + SIDE, left : left + SIDE].copy()).permute(3, 0, 1, 2))
    labels, folds = (torch.tensor(values) for values in ([names.index(video["label"]) for video in videos], [int(video["fold"]) for video in videos]))
    return Clips(clips, labels, folds, groups_of(videos))


def normalised(clips: Tensor) -> Tensor:
    return clips.float() / 127.5 - 1


@torch.inference_mode()
def features_before(model: VideoNet, data: Clips) -> list[Tensor]:
    """What the layers in front of SGS give, for all clips, which every method at a location shares: float16."""
    if next(iter(model.sgs.values())).name == "input":
        return []
    return [model.run_stem(normalised(clips))[0].half() for clips in watched(data.clips.split(BATCH), "features", unit="batch")]


def run(model: VideoNet, before: list[Tensor], data: Clips, location: str, method: str, kept: int) -> Predictions:
    """Classify what a method keeps; one that learns is trained on the other folds, anew for each fold."""
    (layer,) = model.sgs.values()
    if not isinstance(layer.embedding, GlanceEmbedding):
        features, bins = features_behind(model, before, data, location, method, kept)
        found = predictions(features, data.labels, data.folds)
    else:
        found, bins = torch.empty_like(data.labels), []
        start = copy.deepcopy(layer.embedding.state_dict())
        pooled = torch.cat([layer.embedding.pool(normalised(clip)[None]) for clip in data.clips])  # [N, T, C g g]
        for fold in data.folds.unique():
            layer.embedding.load_state_dict(start)
            train_embedding(layer.embedding, pooled, data.labels, (data.folds != fold).nonzero()[:, 0])
            features, kept_of_clips = features_behind(model, before, data, location, method, kept)
            tested = data.folds == fold
            found[tested] = predictions(features, data.labels, tested.long())[tested]
            bins += [kept_of_clips[clip] for clip in tested.nonzero()[:, 0]]
    gflops = mean_cost(model, data, bins) if location else 1.0
    return Predictions(location, method, kept, 0, float(np.mean(bins)), gflops, in_digits(found == data.labels))


def train_embedding(embedding: GlanceEmbedding, pooled: Tensor, labels: Tensor, clips: Tensor) -> None:
    """Train the embedding, by its own loss, on these clips of pooled frames [N, T, C g g] and labels [N]."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(embedding.parameters(), weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=EPOCHS * -(-len(clips) // BATCH_SIZE))
    for _ in watched(range(EPOCHS), "embedding", unit="epoch"):
        for batch in clips[torch.randperm(len(clips))].split(BATCH_SIZE):
            z = embedding(pooled[batch])
            logits, length = embedding.glance(z, torch.ones(z.shape[:2], dtype=torch.bool))
            optimizer.zero_grad()
            (nn.functional.cross_entropy(logits, labels[batch]) + SHORT * length).backward()
            optimizer.step()
            schedule.step()


@torch.inference_mode()
def features_behind(model: VideoNet, before: list[Tensor], data: Clips, location: str, method: str, kept: int) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Calibrate, and return the features that the head is given [N, D] and B' of each clip."""
    batches, (layer,) = data.clips.split(BATCH), model.sgs.values()

    def inputs(number: int) -> tuple[Tensor, ...]:
        """What `run_trunk` takes: the features to sample, and the clips where the layer embeds these."""
        if before and not layer.options.embeds_clip:
            return (before[number].float(),)
        clips = normalised(batches[number]).contiguous(memory_format=torch.channels_last_3d)
        return (before[number].float(), clips) if before else (clips,)

    calibrate(layer, (layer(given[0], None, given[-1]) for given in map(inputs, range(0, len(batches), 7))))
    features: list[Tensor] = []
    hook = model.dense_network.head.register_forward_pre_hook(lambda module, given: features.append(given[0]))
    bins: list[tuple[int, ...]] = []
    for number in watched(range(len(batches)), f"{location} {method} {kept}", unit="batch"):
        given = inputs(number)
        _, (sampled,) = model.run_trunk(*given, decision=decided(layer, method, given[0], given[-1]))
        bins += [(kept_of_clip,) for kept_of_clip in sampled.segments.lengths]
    hook.remove()
    return torch.cat(features), bins


def calibrate(layer: SGS, proposals: Iterable[Proposal]) -> None:
    """Set the bin width, where the layer has one, by what it proposes for some clips."""
    if layer.tracks_width:
        given = list(proposals)
        layer.calibrate(torch.cat([p.z for p in given]), torch.cat([p.valid for p in given]))


@torch.inference_mode()
def numbers_kept(model: VideoNet, data: Clips) -> np.ndarray:
    """Return how many features behind the stem the layer keeps of each clip [N], within NUMBERS."""
    (layer,), batches = model.sgs.values(), data.clips.split(BATCH)
    calibrate(layer, (layer(FRAMES // 2, None, normalised(clips)) for clips in batches[::7]))
    return torch.cat([layer(FRAMES // 2, None, normalised(clips)).lengths for clips in batches]).clamp(min(NUMBERS), max(NUMBERS)).numpy()


def table_of_numbers(hits: dict[int, np.ndarray], numbers: np.ndarray, groups: np.ndarray) -> str:
    """Format what is right [N] with each number of features, and with as many as were kept of each clip [N].

    Each number has a classifier of its own. The control gives the same numbers to the clips at random: the mean over all ways to do so.
    """
    lines = ["| features of a clip | mean number | top-1, % | against the same numbers at random |", "|---|---|---|---|"]
    lines += [f"| {number} evenly spaced | {number} | {100 * hits[number].mean():.1f} | |" for number in NUMBERS]
    by_content = np.array([hits[number][clip] for clip, number in enumerate(numbers)])
    at_random = np.mean([hits[number] for number in numbers], axis=0)
    difference = "{:+.1f} ± {:.1f}".format(*paired(by_content, at_random, groups))
    lines.append(f"| as many as `atfr` keeps of it, evenly spaced | {numbers.mean():.1f} | {100 * by_content.mean():.1f} | {difference} |")
    return "\n".join([*lines, f"| the same numbers at random | {numbers.mean():.1f} | {100 * at_random.mean():.1f} | |"])


def decided(layer: SGS, method: str, x: Tensor, clips: Tensor) -> Decision:
    """Let the layer decide what to keep of features x [N, C, T, H, W]; where the method ends in "as-many", only how many, from equal parts of the clip."""
    decision = decide([layer], [x], [None], None, clips)
    if not method.endswith("as-many"):
        return decision
    (proposal,) = decision.proposals
    weights = uniform_weights((x.shape[2],) * len(x), tuple(proposal.lengths.tolist()), x.device)  # [N, B, T]
    if layer.options.kernel == "middle":
        member = weights > 0
        weights = (member & is_middle(member, weights.argmax(dim=1))[:, None]).to(weights)
    return Decision((proposal._replace(weights=weights),), decision.reports)


def mean_cost(model: VideoNet, data: Clips, bins: list[tuple[int, ...]]) -> float:
    """The mean GFLOPs of clips that keep these B', as a share of dense."""
    costs = model.gflops_table(tuple(data.clips.shape[1:]))
    return float(costs.estimate(bins).mean()) / costs.dense


def in_digits(hits: Tensor) -> str:
    """What `Predictions.right` says of right and wrong predictions [N]."""
    return "".join("01"[hit] for hit in hits.tolist())


@torch.inference_mode(False)
def predictions(x: Tensor, labels: Tensor, folds: Tensor) -> Tensor:
    """Predict each fold by a logistic regression that was fitted to the other two: features [N, D] -> classes [N]."""
    x, classes, found = x.clone().double(), int(labels.max()) + 1, torch.empty_like(labels)
    for fold in folds.unique():
        train = folds != fold
        given = (x - x[train].mean(dim=0)) / (x[train].std(dim=0) + 1e-3)
        given = torch.cat([given, torch.ones(len(x), 1)], dim=1)
        weight = torch.zeros(given.shape[1], classes, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = nn.functional.cross_entropy(given[train] @ weight, labels[train]) + PENALTY / 2 / int(train.sum()) * weight[:-1].square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        found[~train] = (given[~train] @ weight).argmax(dim=1)
    return found


if __name__ == "__main__":
    main()
