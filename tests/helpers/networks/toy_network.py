"""A network of two stages, the second of which is the test's."""

from __future__ import annotations

from torch import Tensor, nn


class Toy(nn.Module):
    """Two stages; what the second does is the test's."""

    def __init__(self, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.pool = nn.Conv3d(3, 8, 1), second, nn.AdaptiveAvgPool3d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.second(self.first(x))).flatten(1)


class Flip(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(2)
