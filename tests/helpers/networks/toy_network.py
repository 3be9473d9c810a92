"""A network of two stages, the second of which is the test's."""

from __future__ import annotations

from torch import Tensor, nn

from atfr.models.packed import ops
from atfr.models.packed.segments import Segments


class Toy(nn.Module):
    """Two stages; what the second does is the test's."""

    def __init__(self, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.pool = nn.Conv3d(3, 8, 1), second, nn.AdaptiveAvgPool3d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.second(self.first(x))).flatten(1)


class Smoothed(nn.Module):
    """A convolution over time with a packed form of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def packed_forward(self, pair: tuple[Tensor, Segments]) -> tuple[Tensor, Segments]:
        return ops.conv3d(self.conv, *pair), pair[1]


class Flip(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(2)
