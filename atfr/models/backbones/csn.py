"""Channel-separated networks (Tran et al., ICCV 2019) from pytorchvideo."""

from __future__ import annotations

from pytorchvideo.models.csn import create_csn
from torch import nn

from atfr.models.backbones.common import mended, variant
from atfr.models.sgs.config import SGSConfig
from atfr.models.video_net import VideoNet

STAGES = {"stem": "blocks.0", "res2": "blocks.1", "res3": "blocks.2", "res4": "blocks.3", "res5": "blocks.4"}

SIZES = {"R101": 101}  # depth


def csn(*, size: str, num_classes: int, dropout: float = 0.5, sgs: SGSConfig | None = None) -> VideoNet:
    """A CSN that takes clips [N, 3, T, H, W]; res3, res4 and res5 each halve T, rounding up.

    It is pytorchvideo's `csn_r101` with its parameters' names; the head pools over all features
    that are there. Dropout is PySlowFast's, with which the published weights were trained; the hub's
    function itself has none.

    Raises:
        ValueError: an unknown size, or options of `sgs` that do not fit (see `VideoNet`).
    """
    network = create_csn(
        model_depth=variant(SIZES, size, network="csn"),
        model_num_class=num_classes,
        dropout_rate=dropout,
        stem_pool=nn.MaxPool3d,
        head_pool=nn.AdaptiveAvgPool3d,  # to 1: pytorchvideo's own pool is of one clip size
        head_activation=None,
    )
    return VideoNet(mended(network), stages=STAGES, sgs=sgs)
