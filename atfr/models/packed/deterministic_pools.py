"""3D pools with a deterministic backward pass on GPUs.

Torch has none for `AvgPool3d` and `AdaptiveAvgPool3d`, nor before torch 2.14 for `MaxPool3d`, and raises an error where
deterministic algorithms are asked for. The 2D pools have one, and a 3D pool is a pool over space followed by one over time.
"""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, max_pool2d

from atfr.models.packed.cpu import has_hooks

POOLS = (nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d)


def pool3d(module: nn.Module, x: Tensor) -> Tensor:
    """Run one of `POOLS`, by 2D pools where torch's 3D one is not deterministic: [N, C, T, H, W] -> [N, C, T', H', W'].

    Outputs and gradients are torch's; average pools add up in another order.
    """
    if type(module) not in POOLS or not needs_deterministic_pool(x) or has_hooks(module):
        return module(x)
    if isinstance(module, nn.AdaptiveAvgPool3d):
        return _from_images(adaptive_avg_pool2d(_images(x), 1), len(x)) if module.output_size == (None, 1, 1) else module(x)
    sizes = [_triple(size) for size in (module.kernel_size, module.stride, module.padding)]
    if isinstance(module, nn.AvgPool3d) and module.divisor_override is None:
        return _space_then_time(avg_pool2d, x, sizes, ceil_mode=module.ceil_mode, count_include_pad=module.count_include_pad)
    if isinstance(module, nn.MaxPool3d) and not module.return_indices:
        return _space_then_time(max_pool2d, x, [*sizes, _triple(module.dilation)], ceil_mode=module.ceil_mode)
    return module(x)


def needs_deterministic_pool(x: Tensor) -> bool:
    """Return whether torch's 3D pools would refuse x."""
    return torch.are_deterministic_algorithms_enabled() and x.device.type != "cpu" and x.dim() == 5 and x.requires_grad and torch.is_grad_enabled()


def _space_then_time(pool: Callable[..., Tensor], x: Tensor, sizes: list[tuple[int, int, int]], **options: bool) -> Tensor:
    """Pool [N, C, T, H, W] -> [N, C, T', H', W']; `sizes` are the kernel, stride, padding and dilation."""
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
    frames, height, width = (size, size, size) if isinstance(size, int) else size
    return frames, height, width
