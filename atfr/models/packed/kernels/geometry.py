"""Kernel size, stride and padding of a depthwise convolution, for the plain functions and the Triton kernels."""

from __future__ import annotations

import math
from typing import NamedTuple, Sequence


class Geometry(NamedTuple):
    """A depthwise convolution; in time it has stride 1 and keeps the length."""

    kernel: tuple[int, int, int]
    stride: tuple[int, int]  # in space
    padding: tuple[int, int]  # in space

    @staticmethod
    def of(kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Geometry:
        """Take a kernel (time, height, width), and stride and padding in space."""
        (time, height, width), (down, right), (above, left) = kernel, stride, padding
        return Geometry((time, height, width), (down, right), (above, left))

    @property
    def taps(self) -> int:
        """The number of weights of a channel."""
        return math.prod(self.kernel)

    def out(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of the output's frames; below 1 where the input's are too small."""
        (_, kh, kw), (sh, sw), (ph, pw) = self
        return (height + 2 * ph - kh) // sh + 1, (width + 2 * pw - kw) // sw + 1
