"""I3D on Inception-v1 (Carreira and Zisserman, "Quo vadis, action recognition?", CVPR 2017), as DeepMind built it.

Its padding is TensorFlow's "SAME": at an even size and a stride of 2, the odd position is added behind. TensorFlow aligns odd
sizes in another way; here they are aligned like even ones, so that the alignment does not depend on a clip's length.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from atfr.models.backbones.common import variant
from atfr.models.sgs.config import SGSConfig
from atfr.models.video_net import VideoNet

STAGES = {"stem": "pool_2a", "res2": "conv_2c", "res3": "mixed_3c", "res4": "mixed_4f", "res5": "mixed_5c"}
SIZES = {"base": 64}  # channels of the stem

# Channels: 1x1x1; 1x1x1 and 3x3x3; 1x1x1 and 3x3x3; 1x1x1 behind the pool.
MIXED = {
    "mixed_3b": (64, 96, 128, 16, 32, 32),
    "mixed_3c": (128, 128, 192, 32, 96, 64),
    "mixed_4b": (192, 96, 208, 16, 48, 64),
    "mixed_4c": (160, 112, 224, 24, 64, 64),
    "mixed_4d": (128, 128, 256, 24, 64, 64),
    "mixed_4e": (112, 144, 288, 32, 64, 64),
    "mixed_4f": (256, 160, 320, 32, 128, 128),
    "mixed_5b": (256, 160, 320, 32, 128, 128),
    "mixed_5c": (384, 192, 384, 48, 128, 128),
}


def inception_i3d(*, size: str, num_classes: int, dropout: float = 0.5, sgs: SGSConfig | None = None) -> VideoNet:
    """Build I3D on Inception-v1 for clips [N, 3, T, H, W]; the stem, res4 and res5 halve T, rounding up.

    The head averages all features; DeepMind's averages windows of 2 x 7 x 7, which gives the first and the last
    feature half the weight.

    Raises:
        ValueError: an unknown size, or options of `sgs` that do not fit (see `VideoNet`).
    """
    return VideoNet(InceptionI3D(num_classes, channels=variant(SIZES, size, network="inception_i3d"), dropout=dropout), stages=STAGES, sgs=sgs)


class InceptionI3D(nn.Module):
    """The network: convolutions, Inception blocks and max pools one after another."""

    def __init__(self, num_classes: int, *, channels: int = 64, dropout: float = 0.5) -> None:
        super().__init__()
        self.conv_1a = Unit(3, channels, 7, stride=2)
        self.pool_2a = max_pool((1, 3, 3), (1, 2, 2))
        self.conv_2b = Unit(channels, 64, 1)
        self.conv_2c = Unit(64, 192, 3)
        self.pool_3a = max_pool((1, 3, 3), (1, 2, 2))
        channels = 192
        for name, branches in MIXED.items():
            if name == "mixed_4b":
                self.pool_4a = max_pool((3, 3, 3), (2, 2, 2))
            if name == "mixed_5b":
                self.pool_5a = max_pool((2, 2, 2), (2, 2, 2))
            self.add_module(name, Mixed(channels, branches))
            channels = branches[0] + branches[2] + branches[4] + branches[5]
        self.pool = nn.AdaptiveAvgPool3d(1)
        self.dropout = nn.Dropout(dropout)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(channels, num_classes)

    def forward(self, clips: Tensor) -> Tensor:
        """Return the logits [N, classes] of clips [N, 3, T, H, W]."""
        x = clips
        for module in self.children():
            x = module(x)
        return x


class Unit(nn.Module):
    """A convolution, batch norm and ReLU."""

    def __init__(self, channels: int, out: int, kernel: int, *, stride: int = 1) -> None:
        super().__init__()
        self.pad = same_padding((kernel,) * 3, (stride,) * 3) if stride > 1 else nn.Identity()
        self.conv = nn.Conv3d(channels, out, kernel, stride=stride, padding=kernel // 2 if stride == 1 else 0, bias=False)
        self.norm = nn.BatchNorm3d(out, eps=1e-3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(self.pad(x))))


class Mixed(nn.Module):
    """An Inception block of four branches, concatenated: [N, C, T, H, W] -> [N, C', T, H, W]."""

    def __init__(self, channels: int, branches: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        one, three_in, three, other_in, other, pooled = branches
        self.branch_0 = Unit(channels, one, 1)
        self.branch_1 = nn.Sequential(Unit(channels, three_in, 1), Unit(three_in, three, 3))
        self.branch_2 = nn.Sequential(Unit(channels, other_in, 1), Unit(other_in, other, 3))
        self.branch_3 = nn.Sequential(nn.MaxPool3d(3, stride=1, padding=1), Unit(channels, pooled, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch_0(x), self.branch_1(x), self.branch_2(x), self.branch_3(x)], 1)


def max_pool(kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> nn.Sequential:
    """A max pool with a stride. It pads with zeros, which change nothing: its input is not negative."""
    return nn.Sequential(same_padding(kernel, stride), nn.MaxPool3d(kernel, stride))


def same_padding(kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> nn.ConstantPad3d:
    """TensorFlow's "SAME" padding of sizes that the stride divides, and one position more behind for the others."""
    sides: list[int] = []
    for k, s in reversed(list(zip(kernel, stride))):  # ConstantPad3d takes the last dimension first
        front = max(k - s, 0) // 2
        sides += [front, k - 1 - front]
    return nn.ConstantPad3d(tuple(sides), 0.0)
