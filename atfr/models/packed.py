"""Packed execution: clips of different length run together, each as if it were alone.

The kept features of all clips stand one after another in time, [1, C, M = sum B', H, W], with the
lengths beside them in `Segments`. Framewise operations (1x1x1 and spatial convolutions, batch
norm, activations, residual sums) run as they are, so batch statistics see no padding. An operation
that looks along time is replaced by one of the functions below.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Segments:
    """How the clips of a packed tensor follow each other in time; lengths are explicit, never inferred."""

    lengths: tuple[int, ...]
    device: torch.device

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"every clip must keep at least one feature, not {self.lengths}")

    def owner(self) -> Tensor:
        """[M] int64: the clip that each packed position belongs to."""
        return _owner(self.lengths, self.device)

    def spaced(self, gap: int) -> Tensor:
        """[M] int64: each position's place once `gap` empty positions part neighbouring clips."""
        return _owner(self.lengths, self.device) * gap + torch.arange(sum(self.lengths), device=self.device)


@lru_cache(maxsize=64)
def _owner(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a tensor made in inference mode could not serve a training step later
        clips = torch.arange(len(lengths))
        return torch.repeat_interleave(clips, torch.tensor(lengths)).to(device)


def conv3d(module: nn.Conv3d, x: Tensor, segments: Segments) -> Tensor:
    """A convolution along time in which no clip sees its neighbours: [1, C, M, H, W] -> [1, C', M, ...]."""
    if x.shape[2] != sum(segments.lengths):
        raise AssertionError(f"packed length {x.shape[2]} is not the sum of {segments.lengths}")
    gap = module.padding[0]
    if len(segments.lengths) == 1 or gap == 0:
        return module(x)
    places = segments.spaced(gap)
    total = sum(segments.lengths) + gap * (len(segments.lengths) - 1)
    spaced = x.new_zeros(*x.shape[:2], total, *x.shape[3:]).index_copy_(2, places, x)
    return module(spaced).index_select(2, places)


def segment_mean(x: Tensor, segments: Segments) -> Tensor:
    """Each clip's mean over time and space: [1, C, M, H, W] -> [N, C, 1, 1, 1]."""
    frames = x.mean(dim=(0, 3, 4)).t()  # [M, C]
    sums = frames.new_zeros(len(segments.lengths), frames.shape[1]).index_add(0, segments.owner(), frames)
    lengths = torch.tensor(segments.lengths, device=x.device, dtype=sums.dtype)
    return (sums / lengths[:, None])[:, :, None, None, None]


def global_pool(module: nn.Module, x: Tensor, segments: Segments) -> Tensor:
    """A head's global average pool: leaves the packed layout for one value a clip."""
    return segment_mean(x, segments)


def squeeze_excitation(module: nn.Module, x: Tensor, segments: Segments) -> Tensor:
    """fvcore's SqueezeExcitation with one excitation a clip."""
    excitation = module.block(segment_mean(x, segments))  # [N, C, 1, 1, 1]
    per_frame = excitation[:, :, 0, 0, 0].index_select(0, segments.owner())  # [M, C]
    return x * per_frame.t()[None, :, :, None, None]
