"""X3D (Feichtenhofer, CVPR 2020) from pytorchvideo, with SGS after any of its stages."""

from __future__ import annotations

from dataclasses import dataclass

from pytorchvideo.layers.swish import Swish
from pytorchvideo.models.x3d import create_x3d
from torch import nn

from atfr.models.backbones.common import mended, variant
from atfr.models.sgs.config import SGSConfig
from atfr.models.video_net import VideoNet

STAGES = {"stem": "blocks.0", "res2": "blocks.1", "res3": "blocks.2", "res4": "blocks.3", "res5": "blocks.4"}


@dataclass(frozen=True)
class Variant:
    """Expansion factors of one X3D (the paper's table 3); its clip is in `configs/model/x3d.yaml`."""

    width_factor: float
    depth_factor: float


SIZES = {
    "tiny": Variant(1.0, 1.0),  # ours: no expansion at all, for the built-in data
    "XS": Variant(2.0, 2.2),
    "S": Variant(2.0, 2.2),
    "M": Variant(2.0, 2.2),
    "L": Variant(2.0, 5.0),
    "XL": Variant(2.9, 5.0),
}


def x3d(*, size: str, num_classes: int, dropout: float = 0.5, sgs: SGSConfig | None = None) -> VideoNet:
    """An X3D that takes clips [N, 3, T, H, W] of any length and size.

    It is pytorchvideo's network with three changes that leave the parameters' names and, on the
    variant's own clip size, the logits as they are: no softmax at the end, the head pools over all
    features that are there, and its Swish, a custom autograd function, is torch's SiLU.

    Raises:
        ValueError: an unknown size, or options of `sgs` that do not fit (see `VideoNet`).
    """
    chosen = variant(SIZES, size, network="x3d")
    network = create_x3d(
        model_num_class=num_classes,
        dropout_rate=dropout,
        width_factor=chosen.width_factor,
        depth_factor=chosen.depth_factor,
        head_activation=None,
    )
    # pytorchvideo's pool is of one clip size (the defaults here); this one has no size.
    network.blocks[-1].pool.pool = nn.AdaptiveAvgPool3d(1)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, Swish):
                setattr(module, name, nn.SiLU())
    return VideoNet(mended(network), stages=STAGES, sgs=sgs)
