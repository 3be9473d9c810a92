"""3D convolutions over space alone or over time alone, run as 2D convolutions on CPUs.

Torch runs small 3D convolutions of one clip, and 1x1x1 ones on one thread, by an own implementation that is up to 8 times
slower than oneDNN (`ConvParams::use_mkldnn` in ATen's Convolution.cpp), and it loses channels-last memory. oneDNN itself is
slower on a 3D convolution over time alone than on a 2D one. In channels-last memory the images are a view of the clips.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torch.nn.modules.module import _has_any_global_hook


def conv3d(module: nn.Conv3d, x: Tensor) -> Tensor:
    """Run a 3D convolution, as a 2D one where that is possible and faster: [N, C, T, H, W] -> [N, C', T', H', W']."""
    kind = separable(module)
    if kind is None or not _prefers_2d(x) or has_hooks(module):
        return module(x)
    stride, padding, dilation = module.stride, module.padding, module.dilation
    if kind == "space":  # over N T images of H x W
        images = x.transpose(1, 2).flatten(0, 1)  # [N T, C, H, W]
        out = conv2d(images, module.weight.squeeze(2), module.bias, stride[1:], padding[1:], dilation[1:], module.groups)
        return out.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
    images = x.permute(0, 2, 3, 4, 1).flatten(2, 3).permute(0, 3, 1, 2)  # N images of T x (H W): [N, C, T, H W]
    out = conv2d(images, module.weight.squeeze(4), module.bias, (stride[0], 1), (padding[0], 0), (dilation[0], 1), module.groups)
    return out.unflatten(3, x.shape[3:])


def separable(module: nn.Module) -> str | None:
    """Return "space" or "time" for torch's own Conv3d with a kernel over that alone, None for any other module."""
    if type(module) is not nn.Conv3d or module.padding_mode != "zeros" or isinstance(module.padding, str):
        return None  # a subclass may do more
    time, *space = zip(module.kernel_size, module.stride, module.padding)
    return "space" if time == (1, 1, 0) else "time" if set(space) == {(1, 1, 0)} else None


def has_hooks(module: nn.Module) -> bool:
    """Return whether calling a module does more than its forward."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or "forward" in vars(module) or _has_any_global_hook()


def _prefers_2d(x: Tensor) -> bool:
    if not isinstance(x, Tensor) or torch.compiler.is_exporting():  # torch.fx and exported files get a 3D convolution
        return False
    # torch.compile takes the strides of a 3D convolution's gradient for constants, and those of packed clips depend on their lengths.
    wanted = x.device.type == "cpu" or torch.compiler.is_compiling()
    return wanted and x.dim() == 5 and x.permute(0, 2, 3, 4, 1).is_contiguous()
