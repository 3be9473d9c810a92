"""Tells the layers behind SGS when each kept feature was, and how far its neighbours are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from atfr.models.packed.segments import Segments


class TimeEmbedding(nn.Module):
    """Scales and shifts each channel of a kept feature by a linear function of its time and of the distances to its neighbours.

    Zero at the start, so that the weights of a dense network mean the same behind it.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2 * channels)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, times: Tensor, first: Tensor, last: Tensor, frames: int, slots: Tensor | None = None) -> Tensor:
        """Embed the time of packed features.

        Args:
            x: [1, C, M, H, W].
            times: [M] in dense features, of which a clip has `frames`.
            first, last: [M] whether a feature is the first or the last one of its clip.
            slots: [M'] the feature in each slot of x, where there are gaps between clips and M' slots in time.
        """
        with torch.autocast(x.device.type, enabled=False):
            scale, shift = self.linear(time_features(times, first, last, frames).to(self.linear.weight.dtype)).chunk(2, dim=1)  # [M, C]
            if slots is not None:
                scale, shift = scale.index_select(0, slots), shift.index_select(0, slots)
            scale, shift = (y.to(x.dtype).t()[None, :, :, None, None] for y in (scale, shift))  # [1, C, M, 1, 1]
            return x * (1 + scale) + shift

    def packed(self, x: Tensor, segments: Segments) -> Tensor:
        """Embed the time of packed features [1, C, M, H, W] with these segments."""
        index = torch.arange(sum(segments.lengths), device=x.device)
        begin, end = segments.bounds.unbind(dim=1)
        layout = segments.layout
        return self(x, segments.times, index == begin, index == end - 1, segments.frames, None if layout is None else layout.source)


def time_features(times: Tensor, first: Tensor, last: Tensor, frames: int) -> Tensor:
    """Return [M, 3]: each feature's time, -1 to 1 in the clip, and the logarithms of the distances to the features before and behind.

    At the clip's border, the neighbour is the mirror image of the feature itself. All distances of a clip that keeps every
    feature are 1, and their logarithms 0.
    """
    before = torch.where(first, 2 * times + 1, (times - times.roll(1)).abs())
    behind = torch.where(last, 2 * (frames - times) - 1, (times.roll(-1) - times).abs())
    return torch.stack([(2 * times + 1) / frames - 1, *(distance.clamp(min=0.1).log() for distance in (before, behind))], dim=1)
