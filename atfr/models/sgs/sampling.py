"""Sample features of a batch by what SGS layers propose: packed features, and a record of what was done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Sequence

import torch
from torch import Tensor

from atfr.models.packed.segments import Segments, shared_gap, unpadded
from atfr.models.sgs.aggregate import aggregate, mean_times
from atfr.models.sgs.fixed import uniform_weights
from atfr.models.sgs.layer import BAD_EMBEDDING, NO_WIDTH, NOT_FINITE, SGS, Proposal, finite_frames


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


class HostCopy:
    """Copies tensors to the host; `wait` waits for what the device was given before, not for what it was given since."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        self._copies = list(tensors)
        device = tensors[0].device
        if device.type == "cuda":
            self._copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]  # to pinned memory
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> list[list[int]]:
        if self._event is not None:
            self._event.synchronize()
        return [copy.tolist() for copy in self._copies]


@dataclass(frozen=True)
class Decision:
    """What the layers of a level decided for a batch; B' may still be on the way to the host."""

    proposals: tuple[Proposal, ...]
    reports: HostCopy | None  # None: B' of all layers is forced


def decide(
    layers: Sequence[SGS],
    features: Sequence[Tensor | int],
    segments: Sequence[Segments | None],
    forced: Forced | None = None,
    clips: Tensor | None = None,
) -> Decision:
    """Let the layers of a level decide what to keep of a batch. For the arguments see `sample`.

    Args:
        features: where the layers embed the clips, the number T of features at each location is enough.
    """
    asked = [None] * len(layers) if forced is None else forced
    proposals = tuple(
        layer(x, s, clips, ask.bins) if isinstance(ask, AtLeast) else layer(x, s, clips) for layer, x, s, ask in zip(layers, features, segments, asked)
    )
    reports = None if all(map(_is_fixed, asked)) else HostCopy([proposal.report for proposal in proposals])
    return Decision(proposals, reports)


def sample(
    layers: Sequence[SGS],
    features: Sequence[Tensor],
    segments: Sequence[Segments | None],
    forced: Forced | None = None,
    clips: Tensor | None = None,
    decision: Decision | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Sampled, ...]]:
    """Sample features of one batch at several locations at once: return the packed features, and what was done.

    Args:
        features: for each layer [N, C, T, H, W], or packed [1, C, M, H, W] where it has segments.
        forced: for each layer what replaces its decision. A tuple: B' of each clip, in bins of equal size, at the same cost.
            An integer: the same, as an upper limit for every clip. `AtLeast`: a lower limit. None: nothing.
        clips: [N, 3, T', H', W'] for layers of embed_from=clip.
        decision: that of `decide` for the same arguments; None, or one for another T: the layers decide now.

    Raises:
        NonFiniteFeatures: features hold a NaN or an infinity; names layer and clip. On a GPU, layers that embed the clips
            do not look at the features: the host would have to wait for them.
        ValueError: a layer is not calibrated, or a clip has fewer features than it is forced to keep.
    """
    asked = [None] * len(layers) if forced is None else list(forced)
    if decision is None or any(s is None and x.shape[2] != p.z.shape[1] for x, s, p in zip(features, segments, decision.proposals)):
        decision = decide(layers, features, segments, forced, clips)
    fixed = list(map(_is_fixed, asked))
    lengths = [()] * len(layers) if all(fixed) else _on_host(layers, decision, fixed)  # no synchronisation where none is needed
    packed, done = [], []
    for layer, x, before, proposal, kept, ask, is_fixed in zip(layers, features, segments, decision.proposals, lengths, asked, fixed):
        weights, times = proposal.weights, proposal.times
        given = (x.shape[2],) * len(x) if before is None else before.lengths
        if is_fixed:
            kept = tuple(min(ask, length) for length in given) if isinstance(ask, int) else tuple(ask)
            weights, times = uniform_weights(given, kept, x.device), None
        elif x.device.type == "cpu" and layer.embeds(clips, x):
            _check_finite(layer, x)
        if times is None:
            start = before or Segments.whole(len(x), x.shape[2], x.device)
            times = mean_times(weights[:, : max(kept)], start.times[start.padded])
        # A backward pass would store the filler frames.
        gap = 0 if torch.is_grad_enabled() or any(norm.training for norm in layer.norms) else shared_gap(kept, layer.gap, x.device)
        times = times[:, : max(kept)].flatten()[unpadded(kept, x.device)]  # [sum B']
        after = Segments(kept, x.shape[2] if before is None else before.frames, times, gap)
        x = aggregate(x, weights, kept, before, layout=after.layout)
        packed.append(x if layer.time is None else layer.time.packed(x, after))
        done.append(Sampled(layer.name, given, after, weights, proposal))
    return tuple(packed), tuple(done)


def _is_fixed(ask: tuple[int, ...] | int | AtLeast | None) -> bool:
    """Return whether a layer's own decision is replaced."""
    return isinstance(ask, (int, tuple, list))


def _on_host(layers: Sequence[SGS], decision: Decision, fixed: Sequence[bool]) -> list[tuple[int, ...]]:
    """Return B' of each clip as plain integers: the one wait for the device in a batch, which carries all errors, too."""
    assert decision.reports is not None
    kept = []
    for layer, is_fixed, report in zip(layers, fixed, decision.reports.wait()):
        if not is_fixed and (layer.lacks_budget or NO_WIDTH in report):
            raise ValueError(f"SGS after {layer.name!r} is not calibrated: call atfr.calibrate(model, clips) or load trained weights")
        if not is_fixed and NOT_FINITE in report:
            raise _not_finite(layer, report.index(NOT_FINITE))
        if not is_fixed and BAD_EMBEDDING in report:
            raise NonFiniteFeatures(f"SGS after {layer.name!r}: the similarity embedding holds a NaN or an infinity")
        kept.append(tuple(report))
    return kept


def _check_finite(layer: SGS, x: Tensor) -> None:
    """Raise NonFiniteFeatures if features [N, C, T, H, W] hold a NaN or an infinity."""
    finite = finite_frames(x).all(dim=1).tolist()
    if False in finite:
        raise _not_finite(layer, finite.index(False))


def _not_finite(layer: SGS, clip: int) -> NonFiniteFeatures:
    return NonFiniteFeatures(f"SGS after {layer.name!r}: the features of clip {clip} of the batch hold a NaN or an infinity")
