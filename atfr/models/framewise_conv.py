"""Convolutions of frames by themselves, 1x1x1 and 1xkxk, run as what they are on CPUs: convolutions of images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from atfr.models.segments import Window, window_of


class FramewiseConv3d(nn.Conv3d):
    """An nn.Conv3d with a kernel of one frame: [N, C, T, H, W] -> [N, C', T, H', W'].

    Torch runs 3D convolutions of one clip that are small, and 1x1x1 ones of one thread, by a slow way of its own, up to
    8 times slower than oneDNN (`ConvParams::use_mkldnn` in ATen's Convolution.cpp), and out of channels-last memory. Of
    images it asks the same, but clips have many. In channels-last memory they are a view.
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.device.type != "cpu" or x.dim() != 5 or torch.compiler.is_compiling() or not x.permute(0, 2, 3, 4, 1).is_contiguous():
            return super()._conv_forward(x, weight, bias)
        images = x.transpose(1, 2).flatten(0, 1)  # [N T, C, H, W]
        out = nn.functional.conv2d(images, weight.squeeze(2), bias, self.stride[1:], self.padding[1:], self.dilation[1:], self.groups)
        return out.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def run_frames_as_images(network: nn.Module) -> None:
    """Make the framewise convolutions of a network FramewiseConv3d; all else about them stays as it is."""
    for module in network.modules():
        if type(module) is not nn.Conv3d or module.padding_mode != "zeros" or isinstance(module.padding, str):
            continue  # a class of somebody else's may do more
        if window_of(module) == Window(1, dilation=module.dilation[0]):
            module.__class__ = FramewiseConv3d
