"""JHMDB with the frozen Kinetics I3D: does it matter which half of the frames is kept, and of which clips more?

    python studies/claim/jhmdb_choice.py        # an hour on one core; features that were computed once are kept in runs/claim

*Which*: each clip goes through the network with 16 of its 32 frames, chosen in 12 ways: every second one, and the middle frames of 11 random
cuts into 16 parts. What chooses among the 12 is compared: nothing, the pixels, an embedding of merge costs, and an oracle, which
takes the features nearest to those of all frames. *How many*: 4, 8, 16 or 32 evenly spaced frames, the same for all clips or by an oracle of the
same mean. The oracles know distances between features, not labels: they bound what a choice by distance gives, and no other.

Nothing of the network is trained; features are classified as in jhmdb.py. Writes the table in studies/claim/README.md.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from claim_probe import spearman
from claim_report import fill, paired
from claim_rows import read_folds
from jhmdb import DENSE, FRAMES, ROOT, Clips, kinetics_weights, network, normalised, options_of, predictions, read_clips
from torch import Tensor, nn

from atfr.models.packed.ops import framewise_pool
from atfr.models.sgs.embedding import PooledEmbedding
from atfr.models.sgs.glance import GlanceEmbedding
from atfr.utils.atomic_io import atomic_write
from atfr.utils.progress import watched

FEATURES = Path("runs/claim/jhmdb_choice")
HALF, WAYS = FRAMES // 2, 12
NUMBERS = (4, 8, HALF, FRAMES)  # of evenly spaced frames
SAVE_EVERY = 50  # clips
EPOCHS, BATCH_SIZE, RATE, DIM, GRID = 30, 16, 2e-3, 16, 16  # of the embedding of merge costs; not searched


@dataclass(frozen=True)
class Choice:
    """One line of the table."""

    name: str
    frames: float  # mean number kept
    distance: float  # mean square of standardised features to those of all frames; 2 between unrelated clips
    hits: np.ndarray  # [N], 0 to 1


def main() -> None:
    argument = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    argument.add_argument("--clips", type=Path, default=Path("../shared/data/videos/jhmdb"), help="folder with the videos and folds.csv (default: %(default)s)")
    folder = argument.parse_args().clips
    os.chdir(ROOT)
    videos = read_folds(folder, way_out="--clips names the folder of JHMDB's videos with that list")
    data = read_clips(folder, videos)
    cuts = random_cuts(len(videos))  # [N, WAYS, HALF + 1]
    model = network(kinetics_weights(), options_of(*DENSE, at="input")).dense_network
    ways = features(model, data, middles(cuts), "ways")  # [N, WAYS, D]
    even = {number: features(model, data, middles(equal_cut(number)).expand(len(videos), 1, -1), f"{number}") for number in NUMBERS if number != HALF}
    even = {number: standardised(ways[:, :1] if number == HALF else even[number]) for number in NUMBERS}  # [N, 1, D]
    ways = standardised(ways)
    distance = (ways - even[FRAMES]).square().mean(dim=2)  # [N, WAYS]
    learned, fitted = learned_costs(distance, cuts, data)
    costs = {"variance of pixels within parts": pixel_costs(cuts, data), "learned merge costs": learned}
    text = table([*of_which(ways, distance, costs, data), *of_how_many(even, data)], data)
    text += "\n\nRank correlation with the distance over the random cuts of a clip, mean over the clips:\n"
    for name, cost in (*costs.items(), ("learned merge costs, on the clips that they were learned from", fitted)):
        mean, error = paired(rank_correlations(cost, distance), np.zeros(len(cost)), data.groups)
        text += f"\n- {name}: {mean / 100:.2f} ± {error / 100:.2f}"
    fill(Path("studies/claim/README.md"), "jhmdb_choice", text, script="jhmdb_choice.py")
    print(text)


def equal_cut(parts: int) -> Tensor:
    """Return where equal parts begin, and the end [parts + 1]."""
    return torch.arange(0, FRAMES + 1, FRAMES // parts)


def random_cuts(clips: int) -> Tensor:
    """Draw where the parts of each way to cut a clip begin, and the end [clips, WAYS, HALF + 1]; the first way has equal parts."""
    random = np.random.default_rng(0)
    cuts = equal_cut(HALF).repeat(clips, WAYS, 1)
    for clip in cuts:
        for cut in clip[1:]:
            cut[1:-1] = torch.from_numpy(np.sort(random.choice(np.arange(1, FRAMES), HALF - 1, replace=False)))
    return cuts


def middles(cuts: Tensor) -> Tensor:
    """Return the middle frame of each part, the earlier one of two: [..., parts + 1] -> [..., parts]."""
    return (cuts[..., :-1] + cuts[..., 1:] - 1) // 2


@torch.inference_mode()
def features(model: nn.Module, data: Clips, frames: Tensor, name: str) -> Tensor:
    """Compute what the head is given for each way to choose frames [N, ways, kept]: [N, ways, D]. Goes on with what was saved for these frames."""
    path = FEATURES / f"{name}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    found: list[np.ndarray] = []
    if path.exists():
        saved = np.load(path)
        found = list(saved["features"]) if np.array_equal(saved["frames"], frames[: len(saved["frames"])]) else []
    seen: list[Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda module, given: seen.append(given[0].flatten(1)))
    for clip in watched(range(len(found), len(frames)), f"features {name}", unit="clip", total=len(frames), initial=len(found)):
        chosen = normalised(data.clips[clip])[:, frames[clip]].transpose(0, 1)  # [ways, 3, kept, H, W]
        model(chosen.contiguous(memory_format=torch.channels_last_3d))
        found.append(seen.pop().half().numpy())
        if (clip + 1) % SAVE_EVERY == 0 or clip + 1 == len(frames):
            with atomic_write(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, features=np.stack(found), frames=frames[: clip + 1].numpy())
    hook.remove()
    return torch.from_numpy(np.stack(found)).float()


def standardised(x: Tensor) -> Tensor:
    """Scale features [N, ways, D] to mean 0 and variance 1 over the clips: what a way changes alike in all clips is no loss."""
    return (x - x.mean(dim=0)) / (x.std(dim=0) + 1e-3)


def of_which(ways: Tensor, distance: Tensor, costs: dict[str, Tensor], data: Clips) -> list[Choice]:
    """Return what is right of every second frame, of random cuts on average, and of the cuts that something chooses."""
    everywhere = torch.arange(len(ways))
    random = np.mean([hits(way, data) for way in ways[:, 1:].unbind(dim=1)], axis=0)
    lines = [
        Choice("every second frame", HALF, distance[:, 0].mean().item(), hits(ways[:, 0], data)),
        Choice(f"a random cut (mean of {WAYS - 1})", HALF, distance[:, 1:].mean().item(), random),
    ]
    chosen = {f"of {WAYS} cuts the one with the least {name}": cost.argmin(dim=1) for name, cost in costs.items()}
    chosen[f"of {WAYS} cuts the one nearest to all frames (oracle)"] = distance.argmin(dim=1)
    return lines + [Choice(name, HALF, distance[everywhere, way].mean().item(), hits(ways[everywhere, way], data)) for name, way in chosen.items()]


def of_how_many(even: dict[int, Tensor], data: Clips) -> list[Choice]:
    """Return what equally many frames of all clips give, and an oracle that spends the same mean where it brings features nearer.

    Each number of frames has a classifier of its own.
    """
    distance = torch.stack([(even[number] - even[FRAMES]).square().mean(dim=(1, 2)) for number in NUMBERS], dim=1)  # [N, NUMBERS]
    right = np.stack([hits(even[number][:, 0], data) for number in NUMBERS], axis=1)  # [N, NUMBERS]
    everywhere, numbers = torch.arange(len(distance)), torch.tensor(NUMBERS)

    def spent(price: float) -> Tensor:
        return (distance + price * numbers).argmin(dim=1)

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if numbers[spent(middle)].float().mean() > HALF else (low, middle)
    which = {f"{number} evenly spaced frames": torch.full((len(distance),), at) for at, number in enumerate(NUMBERS) if number != HALF}  # every second frame
    which |= {f"{', '.join(map(str, NUMBERS[:-1]))} or {FRAMES} evenly spaced frames (oracle)": spent(high)}
    return [Choice(name, numbers[at].float().mean().item(), distance[everywhere, at].mean().item(), right[everywhere, at]) for name, at in which.items()]


def hits(x: Tensor, data: Clips) -> np.ndarray:
    """Return which clips are classified right by their features [N, D]: 0 or 1 [N]."""
    return (predictions(x, data.labels, data.folds) == data.labels).double().numpy()


def rank_correlations(costs: Tensor, distance: Tensor) -> np.ndarray:
    """Return the rank correlation of each clip [N] over its random cuts."""
    return np.array([spearman(*pair) for pair in zip(costs[:, 1:].numpy(), distance[:, 1:].numpy())])


def within_bins(z: Tensor, cuts: Tensor) -> Tensor:
    """Return the sum over frames of |z - mean of their part|^2: z [N, T, D], cuts [N, WAYS, parts + 1] -> [N, WAYS]."""
    z = z.double()
    sums, squares = (nn.functional.pad(x.cumsum(dim=1), (0, 0, 1, 0)) for x in (z, z.square().sum(dim=2, keepdim=True)))  # [N, T + 1, D]
    clip = torch.arange(len(z))[:, None, None]
    parts = sums[clip, cuts[:, :, 1:]] - sums[clip, cuts[:, :, :-1]]  # [N, WAYS, parts, D]
    return squares[:, -1] - (parts.square().sum(dim=3) / cuts.diff(dim=2)).sum(dim=2)


def pixel_costs(cuts: Tensor, data: Clips) -> Tensor:
    """Return the cost of each cut by the pixels that the default layer compares."""
    cells = PooledEmbedding(4)
    return torch.cat([within_bins(cells(cells.pool(normalised(clip)[None])), cut[None]) for clip, cut in zip(data.clips, cuts)])


def learned_costs(distance: Tensor, cuts: Tensor, data: Clips) -> tuple[Tensor, Tensor]:
    """Return the cost of each cut by an embedding that learned from the other folds, and by one that learned from this clip, too.

    The variance within parts shall be the distance of features, but for a factor of each clip, so that the cuts of a clip are told apart.
    """
    pooled = torch.cat([framewise_pool(normalised(clip)[None], GRID) for clip in data.clips])  # [N, T, C GRID GRID]
    found, fitted = torch.empty_like(distance, dtype=torch.float64), torch.empty_like(distance, dtype=torch.float64)
    for fold in data.folds.unique():
        torch.manual_seed(0)
        train, test = (data.folds != fold).nonzero()[:, 0], (data.folds == fold).nonzero()[:, 0]
        embedding = GlanceEmbedding(3, DIM, GRID, num_classes=1)
        optimizer = torch.optim.AdamW(embedding.look.parameters(), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=EPOCHS * -(-len(train) // BATCH_SIZE))
        for _ in watched(range(EPOCHS), f"merge costs, fold {fold}", unit="epoch"):
            for batch in train[torch.randperm(len(train))].split(BATCH_SIZE):
                error = within_bins(embedding(pooled[batch]), cuts[batch]).clamp(min=1e-6).log() - distance[batch].log()
                optimizer.zero_grad()
                (error - error.mean(dim=1, keepdim=True)).square().mean().backward()
                optimizer.step()
                schedule.step()
        with torch.inference_mode():
            for costs, clips in ((found, test), (fitted, train)):
                costs[clips] = torch.cat([within_bins(embedding(pooled[batch]), cuts[batch]) for batch in clips.split(BATCH_SIZE)])
    return found, fitted


def table(choices: list[Choice], data: Clips) -> str:
    """Format the choices, each compared with the first one."""
    every_second = choices[0]
    lines = ["| frames kept | mean number | distance to all frames | top-1, % | against every second frame |", "|---|---|---|---|---|"]
    for choice in choices:
        cell = "" if choice is every_second else "{:+.1f} ± {:.1f}".format(*paired(choice.hits, every_second.hits, data.groups))
        lines.append(f"| {choice.name} | {choice.frames:.1f} | {choice.distance:.2f} | {100 * choice.hits.mean():.1f} | {cell} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
