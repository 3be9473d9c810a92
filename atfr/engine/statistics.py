"""Statistics over a few hundred training clips, refreshed before an evaluation.

Running averages lag behind the weights that they were taken with. Precise batch norm recomputes
them with the weights as they are now, and an SGS width that follows the data is recalibrated on
the same clips. Both are sums over all processes, so every process ends with the same values.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from atfr.engine import distributed
from atfr.models.network import VideoNet
from atfr.models.sgs import calibrated_width


def refresh_statistics(model: VideoNet, clips: Callable[[], Iterable[Tensor]]) -> None:
    """Precise batch norm and a calibrated width, in the order in which one depends on the other.

    The width is measured on the stem's features in evaluation, so the stem's statistics come
    first; those of the trunk come last, since they depend on what is kept. `clips` gives the same
    batches at every call.
    """
    if _tracks_width(model):
        precise_batch_norm(model, clips(), forward=model.stem)
        calibrate_width(model, clips())
    precise_batch_norm(model, clips(), forward=model)


@torch.no_grad()
def precise_batch_norm(model: nn.Module, batches: Iterable[Tensor], *, forward: Callable[[Tensor], object]) -> None:
    """Set the running mean and variance of every batch norm that `forward` uses to those over `batches`.

    Sums are weighted by the number of values, so packed batches of any size count by what is in
    them (Wu & Johnson, "Rethinking Batch in BatchNorm", section 3).
    """
    norms = _batch_norms(model)
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
        total, squares, count = distributed.summed(sums[norm]).split([norm.num_features, norm.num_features, 1])
        if count.item():
            mean = total / count
            norm.running_mean.copy_(mean)
            norm.running_var.copy_((squares / count - mean.square()).clamp(min=0))


@torch.no_grad()
def calibrate_width(model: VideoNet, batches: Iterable[Tensor], *, untrained: bool = False) -> None:
    """Choose the SGS width at which the clips of `batches` keep the target share of their frames.

    An `untrained` network has no running statistics yet, so its features are normalised with those
    of the batch, as in training. Does nothing for a network whose sampling has no width to choose.
    """
    if not _tracks_width(model):
        return
    with _batch_statistics(model) if untrained else _evaluating(model):
        embeddings = [model.sgs.embed(model.stem(clips)).cpu() for clips in batches]
    z = torch.cat(distributed.gathered(embeddings))  # [clips, T, D]
    frames = z.shape[1]
    width = calibrated_width(z, num_bins=model.sgs.num_bins or frames, mean_bins=model.sgs.options.target * frames)
    model.sgs.width.fill_(width)


@torch.no_grad()
def steer_width(model: VideoNet, bins: tuple[int, ...], frames: int) -> None:
    """After a training step: move a tracked width towards its target mean B' / T."""
    if not _tracks_width(model):
        return
    counts = torch.tensor([float(sum(bins)), float(len(bins) * frames)], device=model.sgs.width.device)
    kept, seen = distributed.summed(counts)
    model.sgs.steer(kept / seen)


def _tracks_width(model: VideoNet) -> bool:
    return model.sgs is not None and model.sgs.tracks_width


def _batch_norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]


@contextmanager
def _batch_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms normalise with the batch and leave their buffers alone."""
    was_training, momenta = model.training, {norm: norm.momentum for norm in _batch_norms(model)}
    model.train()
    for norm in momenta:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        model.train(was_training)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
