"""Statistics over a few hundred training clips, refreshed before an evaluation.

Running averages lag behind the weights that they were taken with. Precise batch norm recomputes
them with the weights as they are now, and an SGS width that follows the data is recalibrated on
the same clips. Both are over the clips of all processes, so that every process ends with the same
values, and they do not depend on how many processes the clips are cut among.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from atfr.engine.budgets import keep_ratio_for, refined
from atfr.engine.distributed import comm
from atfr.engine.distributed.sync_batchnorm import batch_norms, sync_batchnorm
from atfr.engine.settings import TrainerSettings
from atfr.models.graph.probing import evaluating
from atfr.models.sgs.layer import Proposal
from atfr.models.sgs.sampling import Sampled
from atfr.models.video_net import VideoNet

KEEP_ALL = 2**31 - 1  # an upper limit that no clip reaches


def clips_for_statistics(batches: Iterable[Any], settings: TrainerSettings) -> list[Tensor]:
    """This process's share of the first `statistics_clips` clips of these batches, one batch at least.

    Kept as bytes in the host's memory: the statistics go over them up to three times, and they
    need not be decoded as often.
    """
    return [batch.clips for batch in islice(batches, statistics_batches(settings))]


def statistics_batches(settings: TrainerSettings) -> int:
    """The most global batches whose clips `clips_for_statistics` takes."""
    return max(1, -(-settings.statistics_clips // settings.batch_size))


def refresh_statistics(model: VideoNet, clips: Callable[[], Iterable[Tensor]], *, gflops: float | None = None) -> None:
    """Recompute batch norm's statistics and calibrate the SGS layers, each before what depends on it.

    A width is measured on features in evaluation, so the statistics of the layers in front are refreshed first; those of
    the layers behind come last, since they depend on what is kept. `clips` gives the same batches at every call.
    """
    for level, layers in enumerate(model.levels):
        if any(layer.tracks_width for layer in layers):
            precise_batch_norm(model, clips(), forward=partial(_proposals, model, level))
        _calibrate_level(model, level, clips(), gflops=gflops)
    precise_batch_norm(model, clips(), forward=model)


@torch.no_grad()
def precise_batch_norm(model: nn.Module, batches: Iterable[Tensor], *, forward: Callable[[Tensor], object]) -> None:
    """Set the running mean and variance of every batch norm that `forward` uses to those over `batches`.

    Sums are weighted by the number of values, so packed batches of any size count by what is in
    them (Wu & Johnson, "Rethinking Batch in BatchNorm", section 3).
    """
    norms = batch_norms(model)
    sums = {norm: torch.zeros(2 * norm.num_features + 1, dtype=torch.float64, device=norm.running_mean.device) for norm in norms}

    def accumulate(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].float()  # [N, C, ...]
        var, mean = torch.var_mean(x, dim=[d for d in range(x.dim()) if d != 1], correction=0)
        count = x.numel() // x.shape[1]
        mean, var = mean.double(), var.double()
        sums[norm] += count * torch.cat([mean, var + mean.square(), mean.new_ones(1)])

    hooks = [norm.register_forward_pre_hook(accumulate) for norm in norms]
    try:
        with _batch_statistics(model):
            for clips in batches:
                forward(clips)
    finally:
        for hook in hooks:
            hook.remove()
    for norm in norms:
        total, squares, count = comm.summed(sums[norm]).split([norm.num_features, norm.num_features, 1])
        if count.item():
            mean = total / count
            norm.running_mean.copy_(mean)
            norm.running_var.copy_((squares / count - mean.square()).clamp(min=0))


def calibrate(
    model: VideoNet, clips: Tensor | Iterable[Any], *, gflops: float | None = None, num_clips: int = 256
) -> float:
    """Set how much each SGS layer keeps so that clips cost a share of the dense GFLOPs on average. Nothing is trained.

    Args:
        model: in any mode, which it keeps; it is run in evaluation mode.
        clips: normalised as for the model: a tensor [N, 3, T, H, W], or batches of them, such as a list or a DataLoader.
            A batch may be a tuple or list whose first item, or a dict whose item "video" or "clips", is the tensor.
            Clips that represent what the model will see, a few hundred of them.
        gflops: mean GFLOPs of a clip as a share of the dense network's; None: the budget in the SGSConfig.
        num_clips: how many clips are used at most.

    Returns:
        The mean share of the dense GFLOPs that these clips cost after the calibration.

    Raises:
        ValueError: there are no clips; the budget is below the cost of one feature a clip; or a layer follows no budget.
    """
    model = _sampled(model)
    if gflops is not None and (isinstance(gflops, str) or not 0 < gflops <= 1):
        raise ValueError(f"gflops is a share of the dense network's GFLOPs, above 0 and at most 1, not {gflops!r}")
    batches = _first_clips(clips, num_clips)
    calibrate_layers(model, lambda: batches, gflops=gflops)
    return mean_share(model, batches)


def _sampled(model: nn.Module) -> VideoNet:
    """Return the network that torch.compile or a wrapper for several GPUs holds; raise ValueError if it has no SGS."""
    network = model if isinstance(model, VideoNet) else getattr(model, "_orig_mod", getattr(model, "module", model))
    if not isinstance(network, VideoNet) or not network.sgs:
        raise ValueError("the model has no SGS layer to calibrate: build it with sgs=..., or use add_sgs")
    return network


def mean_share(model: VideoNet, batches: Iterable[Tensor]) -> float:
    """Return what these clips cost now, as the mean over all of them, and over all processes, of the share of the dense GFLOPs."""
    total, count = 0.0, 0
    with evaluating(model):
        for batch in batches:
            bins, table = model(batch.to(_device(model)), return_sampling=True)[1].bins, model.gflops_table(tuple(batch.shape[1:]))
            total, count = total + table.estimate(bins).sum() / table.dense, count + len(bins)
    total, count = comm.summed(torch.tensor([total, count], dtype=torch.float64, device=_device(model))).tolist()
    return total / count


def _first_clips(clips: Tensor | Iterable[Any], most: int) -> list[Tensor]:
    batches: list[Tensor] = []
    for batch in clips.split(8) if isinstance(clips, Tensor) else clips:
        if isinstance(batch, Mapping):
            batch = batch["video"] if "video" in batch else batch.get("clips")
        elif isinstance(batch, (tuple, list)):
            batch = batch[0] if batch else None
        if not isinstance(batch, Tensor) or batch.dim() != 5:
            what = list(batch.shape) if isinstance(batch, Tensor) else f"a {type(batch).__name__}"
            raise ValueError(f"clips to calibrate on must come as tensors [N, 3, T, H, W], not {what}")
        batches.append(batch[: most - sum(map(len, batches))])
        if sum(map(len, batches)) >= most:
            break
    if not batches:
        raise ValueError("there are no clips to calibrate on")
    shapes = list(dict.fromkeys(tuple(batch.shape[1:]) for batch in batches))
    if len(shapes) > 1:
        raise ValueError(f"clips to calibrate on must have one shape, and there are {list(shapes[0])} and {list(shapes[1])}")
    return batches


def calibrate_layers(model: VideoNet, batches: Callable[[], Iterable[Tensor]], *, gflops: float | None = None, untrained: bool = False) -> None:
    """Calibrate the SGS layers on the clips of `batches`; nothing where no layer follows a budget.

    Args:
        batches: gives the same normalised clips at every call, once for each level of layers behind others.
        gflops: the budget; None: that of the layers' options.
        untrained: the network has no running statistics yet, so its features are normalised with those of the batch.
    """
    for level in range(len(model.levels)):
        _calibrate_level(model, level, batches(), gflops=gflops, untrained=untrained)


@torch.no_grad()
def _calibrate_level(model: VideoNet, level: int, batches: Iterable[Tensor], *, gflops: float | None, untrained: bool = False) -> None:
    """Set the budget of layers that do not depend on each other, and the width and noise floor of those that have them."""
    layers = model.levels[level]
    if gflops is None and not any(layer.options.follows_budget for layer in layers):
        return
    seen: list[list[Proposal]] = []
    shape: tuple[int, ...] = ()
    with _batch_statistics(model) if untrained else evaluating(model):
        for clips in batches:
            shape = tuple(clips.shape[1:])
            if not any(layer.tracks_width for layer in layers):
                break  # baselines depend on the shape alone
            seen.append(_proposals(model, level, clips.to(_device(model))))
    measured = [_gathered([proposals[i] for proposals in seen]) if layer.tracks_width else None for i, layer in enumerate(layers)]
    _set_budget(model, level, shape, gflops, measured)
    for layer, clips_of_layer in zip(layers, measured):
        if clips_of_layer is not None:
            layer.calibrate(*clips_of_layer)


def _set_budget(model: VideoNet, level: int, shape: tuple[int, ...], gflops: float | None, measured: list[tuple[Tensor, Tensor] | None]) -> None:
    """Set the keep ratio of the layers of a level from the budget: `gflops`, or that of their options."""
    layers = model.levels[level]
    options = layers[0].options  # the same for all layers
    budget = options.gflops if gflops is None else gflops
    known = [clips for clips in measured if clips is not None]
    if budget is None:
        assert options.keep_ratio is not None  # an SGSConfig that follows a budget has one of the two
        ratio = options.keep_ratio
    else:
        table = model.gflops_table(shape)
        ratio = keep_ratio_for(table, budget, whole=options.has_fixed_cost)
        if len(model.levels) == 1 and len(known) == len(layers):

            def cost(keep_ratio: float) -> float:
                kept = [layer.bins_for(z, valid, keep_ratio).tolist() for layer, (z, valid) in zip(layers, known)]
                return table.estimate(list(zip(*kept))).mean() / table.dense

            if options.noise_floor:
                for layer, clips in zip(layers, known):
                    layer.calibrate(*clips)  # `cost` uses the floor
            ratio = refined(ratio, budget, cost)
    keep_range: tuple[float, float] | None = None
    if options.gflops_range is not None:
        low, high = (keep_ratio_for(model.gflops_table(shape), share) for share in options.gflops_range)
        keep_range = low, high
    for layer in layers:
        layer.set_budget(ratio, keep_range)


def _gathered(proposals: Sequence[Proposal]) -> tuple[Tensor, Tensor]:
    """z [clips, T, D] and the number of frames [clips] of the clips of all ranks, on the CPU."""
    parts = comm.gathered([(proposal.z.cpu(), proposal.valid.cpu()) for proposal in proposals])
    longest = max(z.shape[1] for z, _ in parts)
    z = torch.cat([nn.functional.pad(z, (0, 0, 0, longest - z.shape[1])) for z, _ in parts])
    return z, torch.cat([valid for _, valid in parts])


def draw_keep_ratios(model: VideoNet, *, seed: int, step: int) -> None:
    """Before a training step: draw the keep ratio of each layer with a `gflops_range`, the same one on all ranks."""
    ranged = [layer for layer in model.sgs.values() if layer.keep_range is not None]
    random = np.random.default_rng((seed, step, 1)) if ranged else None  # another stream than mixup's
    for layer in ranged:
        layer.draw(random)


@torch.no_grad()
def steer_widths(model: VideoNet, parts: Sequence[Sequence[Sampled]]) -> None:
    """After a training step: move the tracked widths towards their keep ratio, over all parts of the batch and all ranks."""
    tracked = [(layer, done) for layer, *done in zip(model.sgs.values(), *parts) if layer.tracks_width]
    if not tracked:
        return
    sums = [float(sum(n)) for _, done in tracked for n in ((sum(d.segments.lengths) for d in done), (sum(d.given) for d in done))]
    # Filled on the device: to copy numbers there from the host would be to wait for it.
    device = tracked[0][0].width.device
    counts = comm.summed(torch.stack([torch.full((), number, device=device) for number in sums]))
    for (layer, _), (kept, given) in zip(tracked, counts.view(-1, 2)):
        layer.steer(kept / given)


def _proposals(model: VideoNet, level: int, clips: Tensor) -> list[Proposal]:
    """What the layers of a level propose for a batch."""
    layers = model.levels[level]
    if level == 0:
        return model.propose(clips)
    # Layers further on may not be calibrated yet: those of this level and behind keep what they are given.
    undecided = {layer for layers in model.levels[level:] for layer in layers}
    forced = [KEEP_ALL if layer in undecided else None for layer in model.sgs.values()]
    _, sampling = model(clips, forced, return_sampling=True)
    return [done.proposal for layer, done in zip(model.sgs.values(), sampling.layers) if layer in layers]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def _batch_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms normalise with the batch of all processes and leave their running statistics alone."""
    was_training, momenta = model.training, {norm: norm.momentum for norm in batch_norms(model)}
    model.train()
    for norm in momenta:
        norm.momentum = 0.0
    try:
        with sync_batchnorm(model):
            yield
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        model.train(was_training)
