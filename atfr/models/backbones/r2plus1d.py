"""R(2+1)D (Tran et al., CVPR 2018): depth 50 from pytorchvideo, depth 18 from torchvision."""

from __future__ import annotations

from pytorchvideo.models.r2plus1d import create_r2plus1d
from torch import nn
from torchvision.models.video import r2plus1d_18

from atfr.models.backbones import torchvision3d
from atfr.models.backbones.common import mended, variant
from atfr.models.sgs.config import SGSConfig
from atfr.models.video_net import VideoNet

STAGES = {"stem": "blocks.0", "res2": "blocks.1", "res3": "blocks.2", "res4": "blocks.3", "res5": "blocks.4"}  # of R50

SIZES = {"tiny": STAGES, "R50": STAGES, "18": torchvision3d.STAGES}
WIDTHS = {"tiny": 16, "R50": 64}  # channels of the stem, to which all others are in proportion


def r2plus1d(*, size: str | int, num_classes: int, dropout: float = 0.5, sgs: SGSConfig | None = None) -> VideoNet:
    """An R(2+1)D that takes clips [N, 3, T, H, W] of any length and size.

    R50 is pytorchvideo's `r2plus1d_r50`, without the softmax at its end and with a head that pools
    over all features that are there; tiny is the same with a quarter of the channels, for the built-in
    data; res4 and res5 halve T, rounding up. 18 is torchvision's
    `r2plus1d_18`, in which res3 halves T too; it was published without dropout. Parameters keep
    their names.

    Raises:
        ValueError: an unknown size, or options of `sgs` that do not fit (see `VideoNet`).
    """
    stages = variant(SIZES, size, network="r2plus1d")
    if str(size) == "18":
        return VideoNet(torchvision3d.video_resnet(r2plus1d_18, num_classes, dropout), stages=stages, sgs=sgs)
    network = create_r2plus1d(
        model_num_class=num_classes,
        dropout_rate=dropout,
        stem_dim_out=WIDTHS[str(size)],
        head_pool=nn.AdaptiveAvgPool3d,  # to 1: pytorchvideo's own pool is of one clip size
        head_activation=None,
    )
    return VideoNet(mended(network), stages=stages, sgs=sgs)
