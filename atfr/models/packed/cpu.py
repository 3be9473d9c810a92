"""3D convolutions over space alone or over time alone, run on CPUs as convolutions of images.

Torch runs 3D convolutions of one clip that are small, and 1x1x1 ones of one thread, by a slow way of its own, up to 8 times
slower than oneDNN (`ConvParams::use_mkldnn` in ATen's Convolution.cpp), and out of channels-last memory. oneDNN itself is
slower over time alone than over one of two dimensions. In channels-last memory the images are a view of the clips.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SpatialConv3d(nn.Conv3d):
    """A 3D convolution with a kernel of one frame, over N T images of H x W: [N, C, T, H, W] -> [N, C', T, H', W']."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not _are_images(x):
            return super()._conv_forward(x, weight, bias)
        images = x.transpose(1, 2).flatten(0, 1)  # [N T, C, H, W]
        out = nn.functional.conv2d(images, weight.squeeze(2), bias, self.stride[1:], self.padding[1:], self.dilation[1:], self.groups)
        return out.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class TemporalConv3d(nn.Conv3d):
    """A 3D convolution with a kernel of one pixel, over N images of T x (H W): [N, C, T, H, W] -> [N, C', T', H, W]."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not _are_images(x):
            return super()._conv_forward(x, weight, bias)
        images = x.permute(0, 2, 3, 4, 1).flatten(2, 3).permute(0, 3, 1, 2)  # [N, C, T, H W]
        stride, padding, dilation = (self.stride[0], 1), (self.padding[0], 0), (self.dilation[0], 1)
        out = nn.functional.conv2d(images, weight.squeeze(4), bias, stride, padding, dilation, self.groups)
        return out.unflatten(3, x.shape[3:])


def run_as_images(network: nn.Module) -> None:
    """Give the convolutions of a network that are over space or over time alone these classes; all else about them stays."""
    for module in network.modules():
        if type(module) is not nn.Conv3d or module.padding_mode != "zeros" or isinstance(module.padding, str):
            continue  # a class of somebody else's may do more
        for kind, rest in ((SpatialConv3d, slice(0, 1)), (TemporalConv3d, slice(1, 3))):  # `rest`: the dimensions it must leave alone
            if {*module.kernel_size[rest], *module.stride[rest]} == {1} and not any(module.padding[rest]):
                module.__class__ = kind
                break


def _are_images(x: Tensor) -> bool:
    if not isinstance(x, Tensor) or torch.compiler.is_exporting():  # torch.fx and exported files shall have a 3D convolution
        return False
    # The compiler takes the strides of a 3D convolution's gradient for constants, and in one of packed clips there is their length.
    wanted = x.device.type == "cpu" or torch.compiler.is_compiling()
    return wanted and x.dim() == 5 and x.permute(0, 2, 3, 4, 1).is_contiguous()
