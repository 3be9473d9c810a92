"""The record of what the SGS layers of a network did with a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Callable

import torch
from torch import Tensor

from atfr.models.sgs.glance import SHORT
from atfr.models.sgs.sampling import Sampled

if TYPE_CHECKING:
    from atfr.models.flops import GflopsTable


@dataclass(frozen=True)
class Sampling:
    """What the SGS layers did with a batch."""

    layers: tuple[Sampled, ...] = field(repr=False)  # one a layer, in the order of `sgs.after`; empty for a dense network
    num_clips: int
    clip_shape: tuple[int, int, int, int]  # (3, T, H, W)
    _costs: Callable[[tuple[int, int, int, int]], GflopsTable] = field(repr=False)

    @property
    def bins(self) -> list[tuple[int, ...]]:
        """B' of each clip, one number a layer; T for a dense network."""
        if not self.layers:
            return [self.frames] * self.num_clips
        return list(zip(*(done.segments.lengths for done in self.layers)))

    def __str__(self) -> str:
        kept = ", ".join("/".join(map(str, bins)) for bins in self.bins)
        return f"{self.num_clips} clips that keep B' = {kept} of {'/'.join(map(str, self.frames))} features"

    @property
    def frames(self) -> tuple[int, ...]:
        """For each layer, how many features a clip has there where nothing is dropped."""
        return tuple(done.segments.frames for done in self.layers) or (self.clip_shape[1],)

    @property
    def assignment(self) -> tuple[Tensor, ...]:
        """For each layer [N, T] int64: the kept feature that each frame went into; -1 where into none."""
        return tuple(done.assignment for done in self.layers)

    @property
    def times(self) -> tuple[tuple[Tensor, ...], ...]:
        """For each layer and clip [B']: the mean time of the frames in each kept feature."""
        return tuple(done.segments.times.split(done.segments.lengths) for done in self.layers)

    def glance_loss(self, loss: Callable[[Tensor, Tensor], Tensor], targets: Tensor) -> Tensor | float:
        """Return what trains embedding=glance, to be added to the loss of the logits; 0 if no layer has it, or outside of a training step.

        Args:
            loss: maps logits [N, classes] and the targets to a scalar, such as torch.nn.functional.cross_entropy.
        """
        total: Tensor | float = 0.0
        for done in self.layers:
            if (glance := done.proposal.glance) is not None:
                total = total + loss(glance.logits.float(), targets) + SHORT * glance.length
        return total

    @property
    def gflops(self) -> Tensor:
        """[N] GFLOPs of each clip, from a table of the network that is made at the first use (see `GflopsTable`)."""
        table = self._costs(self.clip_shape)
        return torch.tensor([table.at(bins) for bins in self.bins])
