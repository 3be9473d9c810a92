"""The source libraries' own networks, small, whose files of weights ours load."""

from __future__ import annotations

from typing import Any

import torch
from batch_norms import spread
from pytorchvideo.models.csn import create_csn
from pytorchvideo.models.r2plus1d import create_r2plus1d
from pytorchvideo.models.resnet import create_resnet
from pytorchvideo.models.slowfast import create_slowfast
from pytorchvideo.models.x3d import create_x3d
from torch import Tensor, nn
from torchvision.models import video

from atfr.models.video_net import VideoNet

CLIP = (2, 3, 4, 32, 32)  # [N, C, T, H, W]


def source_x3d(classes: int = 5) -> nn.Module:
    """Build pytorchvideo's X3D, of the size that our `tiny` has, for CLIP."""
    return spread(create_x3d(input_clip_length=4, input_crop_size=32, model_num_class=classes, width_factor=1.0, depth_factor=1.0, head_activation=None))


def source_slow(**structure: Any) -> nn.Module:
    """Build pytorchvideo's ResNet with the structure of a Slow network."""
    pooled = {"head_pool": nn.AdaptiveAvgPool3d, "stem_dim_out": 8, "stem_conv_kernel_size": (1, 7, 7)}
    return spread(create_resnet(model_num_class=5, **pooled, **structure))


def source_c2d() -> nn.Module:
    """Build pytorchvideo's C2D."""
    return source_slow(stage1_pool=nn.MaxPool3d, stage_conv_a_kernel_size=((1, 1, 1),) * 4)


def source_i3d() -> nn.Module:
    """Build pytorchvideo's I3D."""
    kernels = ((3, 1, 1), [(3, 1, 1), (1, 1, 1)], [(3, 1, 1), (1, 1, 1)], [(1, 1, 1), (3, 1, 1)])
    return source_slow(stage1_pool=nn.MaxPool3d, stage_conv_a_kernel_size=kernels)


def source_r2plus1d() -> nn.Module:
    """Build pytorchvideo's R(2+1)D."""
    return spread(create_r2plus1d(model_num_class=5, stem_dim_out=8, head_pool=nn.AdaptiveAvgPool3d, head_activation=None))


def source_slowfast() -> nn.Module:
    """Build pytorchvideo's SlowFast."""
    return spread(create_slowfast(model_depth=18, stem_dim_outs=(16, 2), model_num_class=5, head_pool=nn.AdaptiveAvgPool3d))


def source_csn() -> nn.Module:
    """Build pytorchvideo's CSN."""
    return spread(create_csn(model_num_class=5, stem_dim_out=8, head_pool=nn.AdaptiveAvgPool3d))


def source_r3d() -> nn.Module:
    """Build torchvision's R3D-18."""
    return spread(video.r3d_18(num_classes=5))


def source_torchvision_r2plus1d() -> nn.Module:
    """Build torchvision's R(2+1)D-18."""
    return spread(video.r2plus1d_18(num_classes=5))


def logits(network: nn.Module, slowfast: bool = False) -> Tensor:
    """Run a network on clips that are always the same."""
    generator = torch.Generator().manual_seed(1)
    clips = torch.randn(CLIP, generator=generator)
    with torch.no_grad():
        return network.eval()([clips[:, :, ::4], clips] if slowfast else clips)


def dense(network: nn.Module) -> VideoNet:
    """Wrap a network without SGS."""
    return VideoNet(network, stages={}, sgs=None)


def assert_same_state(network: nn.Module, source: nn.Module) -> None:
    """Require that a network has every tensor of the source."""
    for name, value in source.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name
