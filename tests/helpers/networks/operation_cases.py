"""Modules whose packed operations are tested: convolutions, pools and non-local blocks."""

from __future__ import annotations

from typing import NamedTuple

from pytorchvideo.layers.nonlocal_net import create_nonlocal
from torch import nn


class Conv(NamedTuple):
    """A convolution, and how it is packed."""

    method: str  # for clips of different length
    kernel: tuple[int, int, int]
    stride: tuple[int, int, int] = (1, 1, 1)
    padding: tuple[int, int, int] = (0, 0, 0)
    dilation: tuple[int, int, int] = (1, 1, 1)
    groups: int = 1
    bias: bool = True

    def module(self) -> nn.Conv3d:
        """Build the convolution, in float64."""
        return nn.Conv3d(4, 8, self.kernel, self.stride, self.padding, self.dilation, self.groups, self.bias).double()


CONVS = [
    Conv("subsample", (1, 1, 1), (2, 1, 1)),
    Conv("subsample", (1, 3, 3), (3, 2, 2), (0, 1, 1), bias=False),
    Conv("subsample", (1, 3, 3), (2, 1, 1), (0, 2, 2), (2, 2, 2), groups=4),
    Conv("gaps", (3, 1, 1), padding=(1, 0, 0)),
    Conv("gaps", (5, 1, 1), padding=(2, 0, 0), bias=False),
    Conv("gaps", (7, 1, 1), padding=(3, 0, 0)),
    Conv("gaps", (3, 1, 1), padding=(2, 0, 0), dilation=(2, 1, 1)),
    Conv("gaps", (5, 1, 1), padding=(6, 0, 0), dilation=(3, 1, 1), bias=False),
    Conv("gaps", (3, 3, 3), padding=(1, 1, 1)),
    Conv("gaps", (3, 3, 3), (1, 2, 2), (1, 1, 1), bias=False),
    Conv("gaps", (3, 3, 3), (1, 2, 1), (1, 2, 1), (1, 2, 1)),
    Conv("gaps", (3, 3, 3), padding=(1, 1, 1), groups=4),
    Conv("gaps", (3, 1, 1), padding=(1, 0, 0), groups=2),
    Conv("gaps", (3, 1, 1), (1, 2, 2), (1, 0, 0)),
    Conv("gaps", (3, 3, 3), (2, 2, 2), (1, 1, 1)),
    Conv("gaps", (3, 1, 1), (2, 1, 1), (1, 0, 0), bias=False),
    Conv("gaps", (3, 1, 1), (3, 1, 1), (1, 0, 0), groups=4),
    Conv("gaps", (5, 1, 1), padding=(2, 0, 0), groups=4),
    Conv("gaps", (5, 3, 3), padding=(2, 1, 1)),
    Conv("gaps", (7, 1, 1), (4, 1, 1), (3, 0, 0)),
    Conv("gaps", (5, 1, 1), (8, 1, 1), (2, 0, 0), bias=False),
    Conv("gaps", (3, 3, 3), padding=(2, 1, 1), dilation=(2, 1, 1)),
    Conv("gaps", (3, 1, 1), (2, 1, 1), (2, 0, 0), (2, 1, 1)),
    Conv("gaps", (3, 3, 3), padding=(2, 1, 1)),  # longer than its input
    Conv("gaps", (5, 1, 1), padding=(3, 0, 0)),
    Conv("gaps", (1, 1, 1), padding=(1, 0, 0)),
    Conv("gaps", (2, 1, 1), (2, 1, 1), (1, 0, 0)),
    Conv("gaps", (4, 1, 1), (3, 1, 1), (2, 0, 0)),
    # An even kernel may keep the length, too: its middle lies between two features.
    Conv("gaps", (2, 1, 1), padding=(1, 0, 0), dilation=(2, 1, 1)),
    Conv("gaps", (4, 1, 1), padding=(3, 0, 0), dilation=(2, 1, 1)),
]


def identify(conv: Conv) -> str:
    """Name a case in the ids of tests."""
    sizes = " ".join("".join(map(str, size)) for size in conv[1:5])
    return f"{conv.method} {sizes} {conv.groups}"


POOLS = [
    nn.MaxPool3d((2, 1, 1), (2, 1, 1), (1, 0, 0)),
    nn.MaxPool3d(3, 2, 1),
    nn.MaxPool3d((3, 3, 3), (1, 1, 1), (1, 1, 1)),
    nn.MaxPool3d((3, 1, 1), (1, 1, 1), (1, 0, 0)),
    nn.MaxPool3d((3, 1, 1), (2, 1, 1), (1, 0, 0), dilation=(2, 1, 1)),
    nn.MaxPool3d((1, 1, 1), (2, 2, 2)),
    nn.AvgPool3d((3, 1, 1), (1, 1, 1), (1, 0, 0)),
    nn.AvgPool3d((3, 3, 3), 2, (1, 1, 1)),
    nn.AvgPool3d((2, 2, 2), (2, 1, 1), (1, 0, 0)),
    nn.AvgPool3d((3, 1, 1), (2, 1, 1), (1, 0, 0), divisor_override=2),
]


def non_local(instantiation: str, pool: tuple[int, int, int] | None, norm: bool = True) -> nn.Module:
    """Build a non-local block in float64, whose batch norm does not begin at zero."""
    module = create_nonlocal(dim_in=4, dim_inner=2, pool_size=pool, instantiation=instantiation, norm=nn.BatchNorm3d if norm else None).eval()
    if norm:
        nn.init.uniform_(module.norm.weight, 0.5, 1.5)  # it begins at zero
        module.norm.running_mean.normal_()
    return module.double()
