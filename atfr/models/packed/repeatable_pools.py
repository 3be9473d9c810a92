"""3D pools with a deterministic backward pass on GPUs.

Torch has none for `AvgPool3d` and `AdaptiveAvgPool3d`, nor before torch 2.14 for `MaxPool3d`, and raises an error where
deterministic algorithms are asked for. The 2D pools that it uses have one, and a 3D pool is a pool over space followed by
one over time.
"""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, max_pool2d


def needs_deterministic_pool(x: Tensor) -> bool:
    """Whether the pools of this module have to take the place of torch's for x."""
    return torch.are_deterministic_algorithms_enabled() and x.device.type != "cpu" and x.dim() == 5 and x.requires_grad and torch.is_grad_enabled()


class MaxPool3d(nn.MaxPool3d):
    """torch's, with the same outputs and gradients."""

    def forward(self, x: Tensor) -> Tensor:
        if self.return_indices or not needs_deterministic_pool(x):
            return super().forward(x)
        sizes = [_triple(size) for size in (self.kernel_size, self.stride, self.padding, self.dilation)]
        return _space_then_time(max_pool2d, x, sizes, ceil_mode=self.ceil_mode)


class AvgPool3d(nn.AvgPool3d):
    """torch's, with sums in another order."""

    def forward(self, x: Tensor) -> Tensor:
        if self.divisor_override is not None or not needs_deterministic_pool(x):
            return super().forward(x)
        sizes = [_triple(size) for size in (self.kernel_size, self.stride, self.padding)]
        return _space_then_time(avg_pool2d, x, sizes, ceil_mode=self.ceil_mode, count_include_pad=self.count_include_pad)


class AdaptiveAvgPool3d(nn.AdaptiveAvgPool3d):
    """torch's of each whole frame; others stay as they are."""

    def forward(self, x: Tensor) -> Tensor:
        if self.output_size != (None, 1, 1) or not needs_deterministic_pool(x):
            return super().forward(x)
        return _from_images(adaptive_avg_pool2d(_images(x), 1), len(x))


POOLS = {nn.MaxPool3d: MaxPool3d, nn.AvgPool3d: AvgPool3d, nn.AdaptiveAvgPool3d: AdaptiveAvgPool3d}


def use_repeatable_pools(network: nn.Module) -> None:
    """Give the 3D pools of a network these classes; all else about them stays."""
    for module in network.modules():
        module.__class__ = POOLS.get(type(module), type(module))


def _space_then_time(pool: Callable[..., Tensor], x: Tensor, sizes: list[tuple[int, int, int]], **options: bool) -> Tensor:
    """A pool [N, C, T, H, W] -> [N, C, T', H', W']; `sizes` are its kernel, stride, padding and dilation."""
    x = _from_images(pool(_images(x), *(size[1:] for size in sizes), **options), len(x))
    rows = x.permute(0, 2, 3, 4, 1).flatten(2, 3).permute(0, 3, 1, 2)  # [N, C, T, H W]
    neutral = (1, 1, 0, 1)
    if any(size[0] != value for size, value in zip(sizes, neutral)):
        rows = pool(rows, *((size[0], value) for size, value in zip(sizes, neutral)), **options)
    return rows.unflatten(3, x.shape[3:])


def _images(x: Tensor) -> Tensor:
    """[N, C, T, H, W] -> [N T, C, H, W]."""
    return x.transpose(1, 2).flatten(0, 1)


def _from_images(images: Tensor, clips: int) -> Tensor:
    return images.unflatten(0, (clips, -1)).transpose(1, 2)


def _triple(size: int | tuple[int, int, int]) -> tuple[int, int, int]:
    return (size,) * 3 if isinstance(size, int) else tuple(size)
