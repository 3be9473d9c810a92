"""The 3D networks of torchvision: R3D, MC3 (Tran et al., CVPR 2018) and S3D (Xie et al., ECCV 2018)."""

from __future__ import annotations

from typing import Callable

from torch import nn
from torchvision.models import video

from atfr.models.backbones.common import variant
from atfr.models.sgs.config import SGSConfig
from atfr.models.video_net import VideoNet

STAGES = {"stem": "stem", "res2": "layer1", "res3": "layer2", "res4": "layer3", "res5": "layer4"}
# S3D is one sequence of convolutions, Inception blocks (3b to 5c) and max pools. As with the strides
# of a ResNet, the pool in front of a stage belongs to that stage; the stem has its own at its end.
S3D_STAGES = {
    "stem": "features.1",  # convolution 1a and its pool
    "res2": "features.3",  # convolutions 2b, 2c
    "res3": "features.6",  # 3b, 3c
    "res4": "features.12",  # 4b to 4f
    "res5": "features.15",  # 5b, 5c
}

R3D_SIZES = {"18": video.r3d_18}
MC3_SIZES = {"18": video.mc3_18}
S3D_SIZES = {"base": video.s3d}  # there is but one


def r3d(*, size: str | int, num_classes: int, dropout: float = 0.0, sgs: SGSConfig | None = None) -> VideoNet:
    """A ResNet of 3x3x3 convolutions for clips [N, 3, T, H, W]; res3 to res5 halve T, rounding up.

    It is torchvision's `r3d_18` with its parameters' names. Dropout, which torchvision does not
    have, goes in front of the last layer.

    Raises:
        ValueError: an unknown size, or options of `sgs` that do not fit (see `VideoNet`).
    """
    return VideoNet(video_resnet(variant(R3D_SIZES, size, network="r3d"), num_classes, dropout), stages=STAGES, sgs=sgs)


def mc3(*, size: str | int, num_classes: int, dropout: float = 0.0, sgs: SGSConfig | None = None) -> VideoNet:
    """R3D up to res2 and a 2D ResNet on each frame from there, for clips [N, 3, T, H, W].

    It is torchvision's `mc3_18`, changed as in `r3d`; T stays as it is up to the head.

    Raises:
        ValueError: an unknown size, or options of `sgs` that do not fit (see `VideoNet`).
    """
    return VideoNet(video_resnet(variant(MC3_SIZES, size, network="mc3"), num_classes, dropout), stages=STAGES, sgs=sgs)


def s3d(*, size: str, num_classes: int, dropout: float = 0.2, sgs: SGSConfig | None = None) -> VideoNet:
    """A separable Inception network for clips [N, 3, T, H, W] with T >= 13, which it divides by 8.

    It is torchvision's `s3d` with its parameters' names. Torchvision averages windows of 2 x 7 x 7
    features, which is the whole of a frame at its own 224 pixels; here the window is 2 frames and
    the whole of them at any size.

    Raises:
        ValueError: an unknown size, or options of `sgs` that do not fit (see `VideoNet`).
    """
    network = variant(S3D_SIZES, size, network="s3d")(weights=None, num_classes=num_classes, dropout=dropout)
    network.avgpool = nn.Sequential(nn.AdaptiveAvgPool3d((None, 1, 1)), nn.AvgPool3d((2, 1, 1), stride=1))
    return VideoNet(network, stages=S3D_STAGES, sgs=sgs)


def video_resnet(build: Callable[..., nn.Module], num_classes: int, dropout: float) -> nn.Module:
    """One of torchvision's video ResNets, without weights and with dropout before the last layer."""
    network = build(weights=None, num_classes=num_classes)
    # Behind the pool and not in front of `fc`, so that fc's parameters keep their names.
    network.avgpool = nn.Sequential(network.avgpool, nn.Dropout(dropout))
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Conv3d):
                setattr(module, name, _plain(child))
    return network


def _plain(conv: nn.Conv3d) -> nn.Conv3d:
    """The same convolution, with the same weight, of torch's own class.

    Torchvision's subclasses only set defaults, but torch.fx would trace into them.
    """
    if type(conv) is nn.Conv3d:
        return conv
    plain = nn.Conv3d(
        conv.in_channels, conv.out_channels, conv.kernel_size, stride=conv.stride, padding=conv.padding, bias=False, device="meta"
    )
    plain.weight = conv.weight
    return plain
