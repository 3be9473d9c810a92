"""Slow, C2D and I3D from pytorchvideo: one ResNet with different temporal kernels."""

from __future__ import annotations

from typing import Any

from pytorchvideo.models.resnet import create_resnet
from torch import nn

from atfr.models.backbones.common import mended, variant
from atfr.models.sgs.config import SGSConfig
from atfr.models.video_net import VideoNet

# Of Slow. C2D and I3D have a temporal max pool behind res2, which moves the later stages by one.
STAGES = {"stem": "blocks.0", "res2": "blocks.1", "res3": "blocks.2", "res4": "blocks.3", "res5": "blocks.4"}
POOLED_STAGES = {"stem": "blocks.0", "res2": "blocks.1", "res3": "blocks.3", "res4": "blocks.4", "res5": "blocks.5"}

SIZES = {"R50": 50}  # depth; other clip lengths (4x16, 8x8, 16x4) are the same network


def slow(*, size: str, num_classes: int, dropout: float = 0.5, sgs: SGSConfig | None = None) -> VideoNet:
    """The Slow pathway of SlowFast by itself (Feichtenhofer et al., ICCV 2019), for clips [N, 3, T, H, W].

    It is pytorchvideo's `slow_r50` with its parameters' names; the head pools over all features
    that are there, so that clips may have any length and size.

    Raises:
        ValueError: an unknown size, or options of `sgs` that do not fit (see `VideoNet`).
    """
    network = _resnet(variant(SIZES, size, network="slow"), num_classes, dropout, stem_conv_kernel_size=(1, 7, 7))
    return VideoNet(network, stages=STAGES, sgs=sgs)


def c2d(*, size: str, num_classes: int, dropout: float = 0.5, sgs: SGSConfig | None = None) -> VideoNet:
    """A 2D ResNet on each frame, with one temporal max pool of 2 behind res2 (Wang et al., CVPR 2018).

    It is pytorchvideo's `c2d_r50`, changed as in `slow`. Clips [N, 3, T, H, W] need T >= 2.

    Raises:
        ValueError: an unknown size, or options of `sgs` that do not fit (see `VideoNet`).
    """
    network = _resnet(
        variant(SIZES, size, network="c2d"),
        num_classes,
        dropout,
        stem_conv_kernel_size=(1, 7, 7),
        stage1_pool=nn.MaxPool3d,
        stage_conv_a_kernel_size=((1, 1, 1),) * 4,
    )
    return VideoNet(network, stages=POOLED_STAGES, sgs=sgs)


def i3d(*, size: str, num_classes: int, dropout: float = 0.5, sgs: SGSConfig | None = None) -> VideoNet:
    """An inflated ResNet (Carreira and Zisserman, CVPR 2017) with a temporal max pool of 2 behind res2.

    It is pytorchvideo's `i3d_r50`, changed as in `slow`. Clips [N, 3, T, H, W] need T >= 2.

    Raises:
        ValueError: an unknown size, or options of `sgs` that do not fit (see `VideoNet`).
    """
    network = _resnet(
        variant(SIZES, size, network="i3d"),
        num_classes,
        dropout,
        stem_conv_kernel_size=(5, 7, 7),
        stage1_pool=nn.MaxPool3d,
        # A list is repeated over the blocks of its stage.
        stage_conv_a_kernel_size=(
            (3, 1, 1),
            [(3, 1, 1), (1, 1, 1)],
            [(3, 1, 1), (1, 1, 1)],
            [(1, 1, 1), (3, 1, 1)],
        ),
    )
    return VideoNet(network, stages=POOLED_STAGES, sgs=sgs)


def _resnet(depth: int, num_classes: int, dropout: float, **structure: Any) -> nn.Module:
    network = create_resnet(
        model_depth=depth,
        model_num_class=num_classes,
        dropout_rate=dropout,
        head_pool=nn.AdaptiveAvgPool3d,  # to 1: pytorchvideo's own pool is of one clip size
        head_activation=None,
        **structure,
    )
    return mended(network)
