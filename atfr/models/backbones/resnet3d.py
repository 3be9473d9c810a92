"""The 3DResNet of the ATFR paper (Fayyaz et al., CVPR 2021): light early, heavy late.

Its stem and res2 are those of SlowFast's Fast pathway (8 -> 32 channels), res3 to res5 are half as
wide as Slow's. Time is never strided. The structure is found from the paper's costs of a clip of
32 x 224 x 224 with SGS after res2, in fvcore's GFLOPs with batch norm: 2.68 + 0.485 B' at depth 18 and
2.85 + 0.895 B' at depth 50. This one has 2.681 + 0.4850 B' and 2.852 + 0.8954 B'; depth 18 with the
one block a stage that SlowFast's depth 18 has would be 2.511 + 0.2945 B'.
"""

from __future__ import annotations

from pytorchvideo.models.head import create_res_basic_head
from pytorchvideo.models.net import Net
from pytorchvideo.models.resnet import create_bottleneck_block, create_res_stage
from pytorchvideo.models.stem import create_res_basic_stem
from torch import nn

from atfr.models.backbones.common import mended, variant
from atfr.models.sgs.config import SGSConfig
from atfr.models.video_net import VideoNet

STAGES = {"stem": "blocks.0", "res2": "blocks.1", "res3": "blocks.2", "res4": "blocks.3", "res5": "blocks.4"}

SIZES = {"tiny": (2, 2, 2, 2), "18": (2, 2, 2, 2), "50": (3, 4, 6, 3)}  # bottleneck blocks of res2 to res5
NARROWING = {"tiny": 2}  # what all channels are divided by; tiny is ours, for the built-in data

STEM_CHANNELS = 8
CHANNELS = (32, 256, 512, 1024)  # at the end of res2 to res5
INNER_CHANNELS = (8, 64, 128, 256)
TEMPORAL_KERNELS = (3, 1, 1, 3)  # of the first convolution of every block
SPATIAL_STRIDES = (1, 2, 2, 2)


def resnet3d(*, size: str | int, num_classes: int, dropout: float = 0.5, sgs: SGSConfig | None = None) -> VideoNet:
    """The paper's 3DResNet for clips [N, 3, T, H, W] of any length and size; T stays up to the head.

    Raises:
        ValueError: an unknown size, or options of `sgs` that do not fit (see `VideoNet`).
    """
    depths, narrowing = variant(SIZES, size, network="resnet3d"), NARROWING.get(str(size), 1)
    dim_in = STEM_CHANNELS // narrowing
    blocks: list[nn.Module] = [_stem(dim_in)]
    for depth, wide, wide_inside, kernel, stride in zip(depths, CHANNELS, INNER_CHANNELS, TEMPORAL_KERNELS, SPATIAL_STRIDES):
        dim_out, dim_inner = wide // narrowing, wide_inside // narrowing
        blocks.append(
            create_res_stage(
                depth=depth,
                dim_in=dim_in,
                dim_inner=dim_inner,
                dim_out=dim_out,
                bottleneck=create_bottleneck_block,
                conv_a_kernel_size=(kernel, 1, 1),
                conv_a_stride=(1, 1, 1),
                conv_a_padding=(kernel // 2, 0, 0),
                conv_b_kernel_size=(1, 3, 3),
                conv_b_stride=(1, stride, stride),
                conv_b_padding=(0, 1, 1),
            )
        )
        dim_in = dim_out
    blocks.append(
        create_res_basic_head(
            in_features=dim_in,
            out_features=num_classes,
            pool=nn.AdaptiveAvgPool3d,
            dropout_rate=dropout,
            activation=None,
        )
    )
    return VideoNet(mended(Net(blocks=nn.ModuleList(blocks))), stages=STAGES, sgs=sgs)


def _stem(channels: int) -> nn.Module:
    return create_res_basic_stem(
        in_channels=3,
        out_channels=channels,
        conv_kernel_size=(5, 7, 7),
        conv_stride=(1, 2, 2),
        conv_padding=(2, 3, 3),
        pool=nn.MaxPool3d,
        pool_kernel_size=(1, 3, 3),
        pool_stride=(1, 2, 2),
        pool_padding=(0, 1, 1),
    )
