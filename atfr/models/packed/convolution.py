"""Runs a 3D convolution that does not depend on lengths in the best way for its device."""

from __future__ import annotations

from torch import Tensor, nn

from atfr.models.packed import cpu
from atfr.models.packed.kernels import depthwise


def conv3d(module: nn.Conv3d, x: Tensor) -> Tensor:
    """Run a convolution by a kernel on CUDA, as a 2D one on CPUs, or as torch does: [N, C, T, H, W] -> [N, C', T', H', W']."""
    if isinstance(x, Tensor) and x.dim() == 5 and depthwise.takes(module, x.device, x.dtype):  # torch.fx gives no tensor
        return depthwise.conv3d(module, x)
    return cpu.conv3d(module, x)


def has_a_better_way(module: nn.Module) -> bool:
    """Return whether `conv3d` runs a module in another way than torch on some device."""
    return cpu.separable(module) is not None or depthwise.is_depthwise(module)
