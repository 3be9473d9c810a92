"""Statistics over a few hundred training clips, refreshed before an evaluation.

Running averages lag behind the weights that they were taken with. Precise batch norm recomputes
them with the weights as they are now, and an SGS width that follows the data is recalibrated on
the same clips. Both are sums over all processes, so every process ends with the same values.
"""

from __future__ import annotations

from typing import Iterable

import torch
from torch import Tensor, nn

from atfr.engine import distributed
from atfr.models.network import VideoNet
from atfr.models.sgs import calibrated_width


@torch.no_grad()
def precise_batch_norm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set every batch norm's running mean and variance to those over `batches` of clips.

    Sums are weighted by the number of values, so packed batches of any size count by what is in
    them (Wu & Johnson, "Rethinking Batch in BatchNorm", section 3).
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    sums = {norm: torch.zeros(2 * norm.num_features + 1, dtype=torch.float64, device=norm.running_mean.device) for norm in norms}

    def accumulate(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].float()  # [N, C, ...]
        var, mean = torch.var_mean(x, dim=[d for d in range(x.dim()) if d != 1], correction=0)
        count = x.numel() // x.shape[1]
        mean, var = mean.double(), var.double()
        sums[norm] += count * torch.cat([mean, var + mean.square(), mean.new_ones(1)])

    was_training, momenta = model.training, {norm: norm.momentum for norm in norms}
    hooks = [norm.register_forward_pre_hook(accumulate) for norm in norms]
    try:
        model.train()
        for norm in norms:
            norm.momentum = 0.0  # the forward passes normalise with the batch and leave the buffers
        for clips in batches:
            model(clips)
    finally:
        for hook in hooks:
            hook.remove()
        for norm in norms:
            norm.momentum = momenta[norm]
        model.train(was_training)
    for norm in norms:
        total, squares, count = distributed.summed(sums[norm]).split([norm.num_features, norm.num_features, 1])
        if count.item():
            mean = total / count
            norm.running_mean.copy_(mean)
            norm.running_var.copy_((squares / count - mean.square()).clamp(min=0))


@torch.no_grad()
def calibrate_width(model: VideoNet, batches: Iterable[Tensor]) -> None:
    """Choose the SGS width at which the clips of `batches` keep the target share of their frames.

    Does nothing for a network whose sampling has no width to choose.
    """
    if model.sgs is None or not model.sgs.tracks_width:
        return
    was_training = model.training
    model.eval()
    embeddings = [model.sgs.embed(model.stem(clips)).cpu() for clips in batches]
    model.train(was_training)
    z = torch.cat(distributed.gathered(embeddings))  # [clips, T, D]
    frames = z.shape[1]
    width = calibrated_width(z, num_bins=model.sgs.num_bins or frames, mean_bins=model.sgs.options.target * frames)
    model.sgs.width.fill_(width)


@torch.no_grad()
def steer_width(model: VideoNet, bins: tuple[int, ...], frames: int) -> None:
    """After a training step: move a tracked width towards its target mean B' / T."""
    if model.sgs is None or not model.sgs.tracks_width:
        return
    counts = torch.tensor([float(sum(bins)), float(len(bins) * frames)], device=model.sgs.width.device)
    kept, seen = distributed.summed(counts)
    model.sgs.steer(kept / seen)
