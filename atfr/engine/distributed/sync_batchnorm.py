"""Batch norm over the clips of all ranks, which may have unequal numbers of clips.

torch's SyncBatchNorm does not run on CPUs, and is another module: a traced network would still call the original one. Here the
modules stay in place with their names and buffers, and only their forward is replaced for a while.
"""

from __future__ import annotations

from contextlib import contextmanager
from types import MethodType
from typing import Any, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from atfr.engine.distributed import comm


def batch_norms(model: nn.Module) -> list[BatchNorm]:
    """Return the batch norms that have running statistics."""
    return [m for m in model.modules() if isinstance(m, BatchNorm) and m.track_running_stats]


@contextmanager
def sync_batchnorm(model: nn.Module) -> Iterator[None]:
    """In this block, batch norms in training mode use and track the statistics of all ranks.

    All ranks must run the same batch norms equally often. With a single rank, nothing changes.
    """
    norms = batch_norms(model) if comm.is_joined() else []
    before = [norm.__dict__.get("forward") for norm in norms]
    for norm in norms:
        norm.forward = MethodType(_forward, norm)
    try:
        yield
    finally:
        for norm, forward in zip(norms, before):
            if forward is None:
                del norm.forward
            else:
                norm.forward = forward


def _forward(norm: BatchNorm, x: Tensor) -> Tensor:
    """Compute `norm(x)` for x [N, C, ...]. N and the sizes after C may differ between ranks."""
    if not norm.training:
        return type(norm).forward(norm, x)
    norm._check_input_dim(x)
    with torch.no_grad():
        mean, var, count = _moments(x)
        norm.num_batches_tracked.add_(1)
        share = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean.to(norm.running_mean), share)
        norm.running_var.lerp_((var * count / (count - 1)).to(norm.running_var), share)
    return _Normalise.apply(x, norm.weight, norm.bias, mean, var, count, norm.eps)


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean [C] and (biased) variance [C] over all ranks, and the number of values per channel, a scalar."""
    own = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    mean, var = (moment.double() for moment in torch.batch_norm_update_stats(own, None, None, 0.0))
    count = x.numel() // x.shape[1]
    # In float64, sums of squares are precise enough, and they need only one all-reduce.
    total = comm.summed(torch.cat([count * mean, count * (var + mean.square()), mean.new_full((1,), count)]))
    first, second, count = total.split([len(mean), len(mean), 1])
    mean = first / count
    return mean.to(own.dtype), (second / count - mean.square()).clamp(min=0).to(own.dtype), count[0].to(own.dtype)


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, with the mean and variance over all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, count: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps = eps
        return nn.functional.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, count = ctx.saved_tensors
        scale = torch.ones_like(mean) if weight is None else weight
        inverse = (var + ctx.eps).rsqrt()
        # First as if mean and variance were constants, then the gradient through them, which is summed over the ranks.
        # CUDA refuses None for the saved mean and inverse deviation; CPUs ignore them here.
        grad_x, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(grad, x, scale, mean, var, mean, inverse, False, ctx.eps, [True] * 3)
        means = comm.summed(torch.cat([by_weight, by_bias]).double()) / count
        through_var, through_mean = means.to(mean).chunk(2)
        slope = scale * inverse.square() * through_var  # [C]
        level = scale * inverse * through_mean - slope * mean
        shape = (-1, *[1] * (x.dim() - 2))
        grad_x.addcmul_(x, slope.view(shape), value=-1).sub_(level.view(shape))
        return grad_x, None if weight is None else by_weight, None if weight is None else by_bias, None, None, None, None
