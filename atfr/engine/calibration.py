"""Statistics over a few hundred training clips, refreshed before an evaluation.

Running averages lag behind the weights that they were taken with. Precise batch norm recomputes
them with the weights as they are now, and an SGS width that follows the data is recalibrated on
the same clips. Both are over the clips of all processes, so that every process ends with the same
values, and they do not depend on how many processes the clips are cut among.
"""

from __future__ import annotations

from contextlib import contextmanager
from itertools import islice
from typing import Any, Callable, ContextManager, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from atfr.engine.distributed import comm
from atfr.engine.distributed.sync_batchnorm import batch_norms, sync_batchnorm
from atfr.engine.settings import TrainerSettings
from atfr.models.graph.probing import evaluating
from atfr.models.sgs.layer import SGS, Proposal, Sampled
from atfr.models.video_net import VideoNet


def clips_for_statistics(batches: Iterable[Any], settings: TrainerSettings) -> list[Tensor]:
    """This process's share of the first `statistics_clips` clips of these batches, one batch at least.

    Kept as bytes in the host's memory: the statistics go over them up to three times, and they
    need not be decoded as often.
    """
    return [batch.clips for batch in islice(batches, statistics_batches(settings))]


def statistics_batches(settings: TrainerSettings) -> int:
    """The most global batches whose clips `clips_for_statistics` takes."""
    return max(1, -(-settings.statistics_clips // settings.batch_size))


def refresh_statistics(model: VideoNet, clips: Callable[[], Iterable[Tensor]]) -> None:
    """Precise batch norm and calibrated widths, in the order in which one depends on the other.

    A width is measured on features in evaluation, so the statistics of what comes before it are
    refreshed first; those of the trunk come last, since they depend on what is kept. `clips` gives
    the same batches at every call.
    """
    for layers in _levels(model):
        precise_batch_norm(model, clips(), forward=lambda batch: _proposals(model, layers, batch))
        _calibrate(model, layers, clips(), evaluating(model))
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


def calibrate_width(model: VideoNet, batches: Callable[[], Iterable[Tensor]], *, untrained: bool = False) -> None:
    """Choose the SGS widths at which the clips of `batches` keep the target share of their features.

    An `untrained` network has no running statistics yet, so its features are normalised with those
    of the batch, as in training. Does nothing for a network whose sampling has no width to choose.
    """
    for layers in _levels(model):
        _calibrate(model, layers, batches(), _batch_statistics(model) if untrained else evaluating(model))


@torch.no_grad()
def _calibrate(model: VideoNet, layers: list[SGS], batches: Iterable[Tensor], mode: ContextManager) -> None:
    """Width, and noise floor where there is one, of layers that do not depend on each other."""
    with mode:
        seen = [_proposals(model, layers, clips) for clips in batches]
    for i, layer in enumerate(layers):
        parts = comm.gathered([(proposals[i].z.cpu(), proposals[i].valid.cpu()) for proposals in seen])
        longest = max(z.shape[1] for z, _ in parts)
        z = torch.cat([nn.functional.pad(z, (0, 0, 0, longest - z.shape[1])) for z, _ in parts])  # [clips, T, D]
        layer.calibrate(z, torch.cat([valid for _, valid in parts]))


def draw_shares(model: VideoNet, *, seed: int, step: int) -> None:
    """Before a training step: choose the share to keep of each layer whose shares are drawn, the same one on all processes."""
    drawn = [layer for layer in model.sgs.values() if layer.options.drawn is not None]
    random = np.random.default_rng((seed, step, 1)) if drawn else None  # not what mixup draws from
    for layer in drawn:
        layer.share = random.uniform(*layer.options.drawn)


@torch.no_grad()
def steer_width(model: VideoNet, parts: Sequence[Sequence[Sampled]]) -> None:
    """After a training step: move the tracked widths towards their target mean B' / T, over all parts of the batch."""
    tracked = [(layer, done) for layer, *done in zip(model.sgs.values(), *parts) if layer.tracks_width]
    if not tracked:
        return
    sums = [float(sum(n)) for _, done in tracked for n in ((sum(d.segments.lengths) for d in done), (sum(d.given) for d in done))]
    # Filled on the device: to copy numbers there from the host would be to wait for it.
    device = tracked[0][0].width.device
    counts = comm.summed(torch.stack([torch.full((), number, device=device) for number in sums]))
    for (layer, _), (kept, given) in zip(tracked, counts.view(-1, 2)):
        layer.steer(kept / given)


class _Reached(Exception):
    """Every layer that was waited for has made its proposal."""


def _proposals(model: VideoNet, layers: list[SGS], clips: Tensor) -> list[Proposal]:
    """What these layers propose for a batch; the network behind them is not run."""
    found: dict[SGS, Proposal] = {}

    def note(layer: SGS, inputs: tuple, proposal: Proposal) -> None:
        found[layer] = proposal
        if len(found) == len(layers):
            raise _Reached

    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        model(clips)
    except _Reached:
        return [found[layer] for layer in layers]
    finally:
        for hook in hooks:
            hook.remove()
    raise AssertionError("the network ended before its SGS layers were reached")


def _levels(model: VideoNet) -> list[list[SGS]]:
    """The layers with a width to choose, those that do not depend on each other in one list."""
    levels = [[layer for layer in level if layer.tracks_width] for level in model.levels]
    return [level for level in levels if level]


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
