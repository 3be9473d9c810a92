"""Sample features of a batch by what SGS layers propose: packed features, and a record of what was done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Sequence

import torch
from torch import Tensor

from atfr.models.packed.segments import Segments, shared_gap, unpadded
from atfr.models.sgs.aggregate import aggregate, mean_times
from atfr.models.sgs.fixed import uniform_weights
from atfr.models.sgs.layer import SGS, Proposal


class NonFiniteFeatures(ValueError):
    """The features that an SGS layer was given hold a NaN or an infinity."""


class Sampled(NamedTuple):
    """What a layer did with a batch."""

    layer: str
    given: tuple[int, ...]  # features that each clip came with
    segments: Segments  # those that it goes on with: B' and times
    weights: Tensor  # [N, B, T]
    proposal: Proposal  # what the layer wanted; the same unless it was forced

    @property
    def assignment(self) -> Tensor:
        """[N, T] int64: the kept feature that each frame went into; -1 where into none."""
        weight, feature = self.weights.detach().max(dim=1)
        return feature.where(weight > 0, -1)


@dataclass(frozen=True)
class AtLeast:
    """Let a layer decide, but keep at least so many features of each clip of the batch."""

    bins: int


Forced = Sequence["tuple[int, ...] | int | AtLeast | None"]


def sample(
    layers: Sequence[SGS],
    features: Sequence[Tensor],
    segments: Sequence[Segments | None],
    forced: Forced | None = None,
    clips: Tensor | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Sampled, ...]]:
    """Sample features of one batch at several locations at once: return the packed features, and what was done.

    Args:
        features: for each layer [N, C, T, H, W], or packed [1, C, M, H, W] where it has segments.
        forced: for each layer what replaces its decision. A tuple: B' of each clip, in bins of equal size, at the same cost.
            An integer: the same, as an upper limit for every clip. `AtLeast`: a lower limit. None: nothing.
        clips: [N, 3, T', H', W'] for layers of embed_from=clip.

    Raises:
        NonFiniteFeatures: features hold a NaN or an infinity; names layer and clip.
        ValueError: a layer is not calibrated, or a clip has fewer features than it is forced to keep.
    """
    asked = [None] * len(layers) if forced is None else list(forced)
    proposals = [
        layer(x, s, clips, ask.bins) if isinstance(ask, AtLeast) else layer(x, s, clips) for layer, x, s, ask in zip(layers, features, segments, asked)
    ]
    decided = [isinstance(ask, (int, tuple, list)) for ask in asked]
    lengths = [()] * len(layers) if all(decided) else _on_host(layers, proposals, decided)  # no synchronisation where none is needed
    packed, done = [], []
    for layer, x, before, proposal, kept, ask in zip(layers, features, segments, proposals, lengths, asked):
        start = before or Segments.whole(len(x), x.shape[2], x.device)
        weights = proposal.weights
        if ask is not None and not isinstance(ask, AtLeast):
            kept = tuple(min(ask, length) for length in start.lengths) if isinstance(ask, int) else tuple(ask)
            weights = uniform_weights(start.lengths, kept, x.device)
        # A backward pass would store the filler frames.
        gap = 0 if torch.is_grad_enabled() or any(norm.training for norm in layer.norms) else shared_gap(kept, layer.gap, x.device)
        times = mean_times(weights[:, : max(kept)], start.times[start.padded]).flatten()[unpadded(kept, x.device)]  # [sum B']
        after = Segments(kept, start.frames, times, gap)
        packed.append(aggregate(x, weights, kept, before, layout=after.layout))
        done.append(Sampled(layer.name, start.lengths, after, weights, proposal))
    return tuple(packed), tuple(done)


def _on_host(layers: Sequence[SGS], proposals: Sequence[Proposal], decided: Sequence[bool]) -> list[tuple[int, ...]]:
    """Return B' of each clip as plain integers: the one synchronisation of a batch, which carries all errors, too."""
    columns = []
    for layer, (z, _, _, lengths, finite) in zip(layers, proposals):
        unset = layer.width.isnan() if layer.options.scale == "absolute" else (lengths.new_ones if layer.lacks_budget else lengths.new_zeros)(())
        spoilt = ~z.isfinite().all()
        columns.append(torch.cat([lengths.where(finite, 0), torch.stack([unset, spoilt]).to(lengths)]))
    kept = []
    for layer, forced, (*lengths, unset, spoilt) in zip(layers, decided, torch.stack(columns).tolist()):
        if not forced and unset:
            raise ValueError(f"SGS after {layer.name!r} is not calibrated: call atfr.calibrate(model, clips) or load trained weights")
        if not forced and 0 in lengths:
            raise NonFiniteFeatures(f"SGS after {layer.name!r}: the features of clip {lengths.index(0)} of the batch hold a NaN or an infinity")
        if not forced and spoilt:
            raise NonFiniteFeatures(f"SGS after {layer.name!r}: the similarity embedding holds a NaN or an infinity")
        kept.append(tuple(lengths))
    return kept
