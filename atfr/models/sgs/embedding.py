"""The similarity embeddings z of frames or features."""

from __future__ import annotations

from torch import Tensor, nn

from atfr.models.packed.deterministic_pools import needs_deterministic_pool
from atfr.models.packed.ops import framewise_pool


class PooledEmbedding(nn.Module):
    """z without parameters: LayerNorm of each frame's features averaged over a grid of cells."""

    def __init__(self, grid: int) -> None:
        super().__init__()
        self.grid = grid

    def pool(self, x: Tensor) -> Tensor:
        """[N, C, T, H, W] -> [N, T, C g g]."""
        return framewise_pool(x.detach(), self.grid)

    def forward(self, pooled: Tensor) -> Tensor:
        return nn.functional.layer_norm(pooled, pooled.shape[2:])


class MLPEmbedding(nn.Module):
    """z as published (paper section 3.1): average pool, Linear, ReLU, Linear, BatchNorm over D.

    A convolution gives a clip other roundings alone than in a batch, and scale=relative magnifies the
    difference by the size of z over the distances within a clip. So all but the statistics of a
    training batch is in float64, where little is added to it and much of it averages out.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, max(channels // 2, 1))
        self.out = nn.Linear(max(channels // 2, 1), dim)
        self.norm = nn.BatchNorm1d(dim)

    def pool(self, x: Tensor) -> Tensor:
        """[N, C, T, H, W] -> [N, T, C] in float64, of the rows' means in the type of x: all in float64 takes 20 times as long."""
        images = x.transpose(1, 2).flatten(0, 1)
        if needs_deterministic_pool(x):
            rows = images.mean(dim=3, keepdim=True)
        else:
            rows = nn.functional.adaptive_avg_pool2d(images, (int(x.shape[3]), 1))  # [N T, C, H, 1]
        return rows.double().mean(dim=(2, 3)).unflatten(0, (x.shape[0], x.shape[2]))

    def forward(self, pooled: Tensor) -> Tensor:
        hidden = _linear64(self.hidden, pooled).relu()
        z = _linear64(self.out, hidden).transpose(1, 2)  # [N, D, T]
        norm = self.norm
        if norm.training:
            return norm(z.to(norm.weight.dtype)).transpose(1, 2)
        mean, variance, weight, bias = (t.double() for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
        return nn.functional.batch_norm(z, mean, variance, weight, bias, eps=norm.eps).transpose(1, 2)


def _linear64(module: nn.Linear, x: Tensor) -> Tensor:
    return nn.functional.linear(x, module.weight.double(), module.bias.double())
