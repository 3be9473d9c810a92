"""The SGS layer: similarity embedding, sampling and aggregation of one batch of clips.

The mathematics is in `atfr.models.sgs.functional`; running what the layer returns is `atfr.models.packed.ops`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from atfr.models.packed.deterministic_pools import needs_deterministic_pool
from atfr.models.packed.ops import framewise_pool
from atfr.models.packed.segments import Segments, shared_gap, unpadded
from atfr.models.sgs import functional
from atfr.models.sgs.aggregate import aggregate, at_least_float32, mean_times
from atfr.models.sgs.config import SGSConfig
from atfr.models.sgs.fixed import uniform_weights
from atfr.models.sgs.partition import width_keeping


class NonFiniteFeatures(ValueError):
    """The features that an SGS layer was given hold a NaN or an infinity."""


class PooledEmbedding(nn.Module):
    """z without parameters: LayerNorm of each frame's features averaged over a grid of cells."""

    def __init__(self, grid: int) -> None:
        super().__init__()
        self.grid = grid

    def pool(self, x: Tensor) -> Tensor:
        """[N, C, T, H, W] -> [N, T, C g g]."""
        return framewise_pool(x.detach(), self.grid)

    def forward(self, pooled: Tensor) -> Tensor:
        return nn.functional.layer_norm(pooled, pooled.shape[2:])


class MLPEmbedding(nn.Module):
    """z as published (paper section 3.1): average pool, Linear, ReLU, Linear, BatchNorm over D.

    A convolution gives a clip other roundings alone than in a batch, and scale=relative magnifies the
    difference by the size of z over the distances within a clip. So all but the statistics of a
    training batch is in float64, where little is added to it and much of it averages out.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, max(channels // 2, 1))
        self.out = nn.Linear(max(channels // 2, 1), dim)
        self.norm = nn.BatchNorm1d(dim)

    def pool(self, x: Tensor) -> Tensor:
        """[N, C, T, H, W] -> [N, T, C] in float64, of the rows' means in the type of x: all in float64 takes 20 times as long."""
        images = x.transpose(1, 2).flatten(0, 1)
        if needs_deterministic_pool(x):
            rows = images.mean(dim=3, keepdim=True)
        else:
            rows = nn.functional.adaptive_avg_pool2d(images, (int(x.shape[3]), 1))  # [N T, C, H, 1]
        return rows.double().mean(dim=(2, 3)).unflatten(0, (x.shape[0], x.shape[2]))

    def forward(self, pooled: Tensor) -> Tensor:
        hidden = _linear64(self.hidden, pooled).relu()
        z = _linear64(self.out, hidden).transpose(1, 2)  # [N, D, T]
        norm = self.norm
        if norm.training:
            return norm(z.to(norm.weight.dtype)).transpose(1, 2)
        mean, variance, weight, bias = (t.double() for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
        return nn.functional.batch_norm(z, mean, variance, weight, bias, eps=norm.eps).transpose(1, 2)


def _linear64(module: nn.Linear, x: Tensor) -> Tensor:
    return nn.functional.linear(x, module.weight.double(), module.bias.double())


class Proposal(NamedTuple):
    """What a layer wants to do with a batch, still on the device."""

    z: Tensor  # [N, T, D] embeddings
    valid: Tensor  # [N] how many of the T frames each clip has
    weights: Tensor  # [N, B, T] kept bins first, zero rows after
    lengths: Tensor  # [N] B' of each clip
    finite: Tensor  # [N] whether all of a clip's features are finite numbers


class SGS(nn.Module):
    """Proposes how to sample a batch of clips.

    With scale=absolute the bin width is one buffer shared by all clips. A layer that follows a budget must be calibrated
    before its first use; a trainer then holds the width to the budget with `steer`.

    Args:
        min_bins: the fewest features that the layers behind it can run on.
        gap: filler frames between packed clips in evaluation; 0: each operation pads for itself.
        norms: the network's batch norms, which must see no filler frames while they train.
    """

    def __init__(
        self, channels: int, options: SGSConfig, *, name: str, min_bins: int = 1, gap: int = 0, norms: Sequence[nn.Module] = ()
    ) -> None:
        super().__init__()
        self.options, self.name, self.min_bins, self.gap = options, name, min_bins, gap
        self.norms = tuple(norms)  # a tuple: they are registered in the network, and not a second time here
        self.keep_ratio = options.keep_ratio  # mean B' / T that the layer is held to; None before `set_budget`
        self.keep_range: tuple[float, float] | None = None  # of training batches, from `gflops_range`
        self._drawn_ratio: float | None = None  # keep ratio of the next training batch; None: torch's generator draws it
        if self.is_baseline:
            self.embedding = None
        elif options.embedding == "pooled":
            self.embedding = PooledEmbedding(options.grid)
        else:
            self.embedding = MLPEmbedding(channels, options.embedding_dim)
            self.embedding.requires_grad_(options.embedding == "mlp")
        if options.scale == "absolute":
            self.register_buffer("width", torch.tensor(math.nan if options.width is None else options.width))
        if options.noise_floor:
            self.register_buffer("floor", torch.tensor(math.nan))

    def get_extra_state(self) -> Tensor:
        """Return the budget for `state_dict`: keep ratio and range [3], NaN where not set."""
        low, high = self.keep_range or (math.nan, math.nan)
        return torch.tensor([math.nan if self.keep_ratio is None else self.keep_ratio, low, high], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the budget from `state_dict`."""
        ratio, low, high = state.tolist()
        self.keep_ratio = None if math.isnan(ratio) else ratio
        self.keep_range = None if math.isnan(low) else (low, high)

    def set_budget(self, keep_ratio: float, keep_range: tuple[float, float] | None = None) -> None:
        """Keep this share of the features on average from the next calibration on; a baseline from the next batch on.

        Args:
            keep_ratio: mean B' / T, above 0 and at most 1.
            keep_range: the smallest and the largest keep ratio of training batches, where they are drawn.

        Raises:
            ValueError: the options of this layer leave B' to something else than a budget.
        """
        o = self.options
        if not o.follows_budget:
            fixed = "num_bins" if self.is_baseline and o.num_bins is not None else "width" if o.width is not None else f"similarity={o.similarity}, scale={o.scale}"
            raise ValueError(
                f"SGS after {self.name!r} follows no budget, since its {fixed} decides B': scale=absolute without a width does, and so do uniform, stride and random without num_bins"
            )
        self.keep_ratio, self.keep_range = keep_ratio, keep_range

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SGS:
        """`model.half()` leaves this layer in float32, in which it computes: a width in half precision is another width."""

        def at_least_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        return super()._apply(at_least_float32, recurse)

    @property
    def is_baseline(self) -> bool:
        """Whether B' does not depend on what a clip shows."""
        return self.options.is_baseline

    @property
    def tracks_width(self) -> bool:
        """Whether the bin width is calibrated and held to a budget while training."""
        return self.options.follows_budget and not self.is_baseline

    @property
    def lacks_budget(self) -> bool:
        """Whether this is a baseline that has to be calibrated before it can run."""
        return self.is_baseline and self.options.follows_budget and self.keep_ratio is None

    def most_bins(self, frames: int, min_bins: int = 1) -> int:
        """Return B for clips of `frames` features, at least `min_bins` where a keep ratio decides it."""
        if self.options.num_bins is not None:
            return self.options.num_bins
        if not self.is_baseline or self.keep_ratio is None:
            return frames
        return max(self.min_bins, min_bins, round(self.keep_ratio * frames))

    def forward(self, x: Tensor, segments: Segments | None = None, clips: Tensor | None = None, min_bins: int = 1) -> Proposal:
        """Propose how to sample features [N, C, T, H, W], or packed ones [1, C, M, H, W] with their segments.

        With embed_from=clip the embedding is that of `clips` [N, 3, T', H', W'], where they are given: z of a feature is
        that of the frame at its time, or the mean of several where T < T'. In float32 or float64 even under autocast.

        Args:
            min_bins: the fewest features that each clip of this batch must keep, beyond those that the layer needs anyway.

        Raises:
            ValueError: the layer lies on another device than x, or a clip is too short for the layers behind.
        """
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if tensor.device != x.device:
                raise ValueError(f"SGS after {self.name!r}: its {name} is on {tensor.device} and the features are on {x.device}: move the network with model.to(device)")
        with torch.autocast(x.device.type, enabled=False):
            embeds_clip = self.options.embeds_clip and clips is not None and clips is not x  # at the input they are the same
            return self._propose(at_least_float32(x), segments, at_least_float32(clips) if embeds_clip else None, max(self.min_bins, min_bins))

    def _most_bins_for(self, lengths: Sequence[int], frames: int, least: int) -> int:
        most = self.most_bins(frames, least)
        if min(lengths) < least:
            raise ValueError(f"SGS after {self.name!r}: the layers behind need at least {least} features, and a clip has {min(lengths)}")
        if most < least:
            raise ValueError(f"model.sgs.num_bins={self.options.num_bins} is too few: the layers behind {self.name!r} need at least {least}")
        return most

    def _propose(self, x: Tensor, segments: Segments | None, clips: Tensor | None, least: int) -> Proposal:
        o = self.options
        frames = int(x.shape[2] if segments is None else segments.frames)  # a tensor while torch.jit traces
        num_bins = self._most_bins_for((frames,) if segments is None else segments.lengths, frames, least)
        if self.embedding is None:  # a baseline, which looks at the number of frames alone
            z = x.new_zeros(*(x.shape[::2][:2] if segments is None else segments.padded.shape), 1)  # [N, T, 1]
            finite = _finite_frames(x)
        else:
            pooled = self.embedding.pool(x) if clips is None else _averaged_to(self.embedding.pool(clips), frames)  # [N, T, ...] or [1, M, ...]
            z = self.embedding(pooled)
            # Batch norm spreads a NaN to the z of every clip, so the clip at fault shows in what was pooled.
            finite = pooled.isfinite().all(dim=2)
            if clips is not None:
                finite = finite & _finite_frames(x)
            z = z if segments is None else z[0][segments.padded]
        finite = (finite if segments is None else finite[0][segments.padded]).all(dim=1)
        valid = None if segments is None else torch.tensor(segments.lengths)  # on the host, where it is checked
        width = self.width if o.scale == "absolute" else None
        if self.keep_range is not None and self.training and torch.is_grad_enabled():  # not where statistics are taken
            width = self._drawn_width(z, valid, self.keep_range)
        weights, lengths = self._sampling(z, valid, width=width, num_bins=num_bins, least=least)
        return Proposal(z, lengths.new_full((len(z),), z.shape[1]) if valid is None else valid, weights.to(x.dtype), lengths, finite)

    def _sampling(self, z: Tensor, valid: Tensor | None, *, width: Tensor | float | None, num_bins: int, least: int) -> tuple[Tensor, Tensor]:
        """`functional.sampling_weights` with this layer's options."""
        o = self.options
        return functional.sampling_weights(
            z,
            num_bins=num_bins,
            similarity=o.similarity,
            metric=o.metric,
            kernel=o.kernel,
            scale=o.scale,
            edges=o.edges,
            order=o.order,
            width=width,
            valid=valid,
            min_bins=least,
            noise_floor=self.floor if o.noise_floor else 0.0,
            cost_exponent=o.cost_exponent,
        )

    @torch.no_grad()
    def calibrate(self, z: Tensor, valid: Tensor) -> None:
        """Choose noise floor and width so that clips z [N, T, D], of which `valid` [N] frames exist, keep the keep ratio."""
        if self.options.noise_floor:
            self.floor.fill_(functional.median_step(z, self.options.metric, valid))
        if self.keep_ratio is not None:
            self.width.fill_(self._width_for(z, valid, self.keep_ratio))

    @torch.no_grad()
    def bins_for(self, z: Tensor, valid: Tensor, keep_ratio: float) -> Tensor:
        """Return the B' [N] of clips z [N, T, D] at the width that gives this keep ratio, on the device of z."""
        return self._sampling(z, valid, width=self._width_for(z, valid, keep_ratio), num_bins=self.most_bins(z.shape[1]), least=self.min_bins)[1]

    def draw(self, random: np.random.Generator) -> None:
        """Draw the keep ratio of the next training batch from the range; nothing where there is none."""
        if self.keep_range is not None:
            self._drawn_ratio = random.uniform(*self.keep_range)

    @torch.no_grad()
    def _drawn_width(self, z: Tensor, valid: Tensor | None, keep_range: tuple[float, float]) -> Tensor | float:
        """The width for a training batch; a partition's is found without a wait for the device. `_on_host` finds a NaN."""
        low, high = keep_range
        ratio = low + (high - low) * torch.rand(()).item() if self._drawn_ratio is None else self._drawn_ratio  # on the host
        z = z.nan_to_num(0, 0, 0)
        if self.options.similarity != "partition":
            return self._width_for(z, valid, ratio)
        frames = torch.full((len(z),), z.shape[1], device=z.device) if valid is None else valid.to(z.device, non_blocking=True)
        mean_bins = ratio * (z.shape[1] if valid is None else valid.double().mean().item())  # lengths are on the host
        z = z.masked_fill((torch.arange(z.shape[1], device=z.device) >= frames[:, None])[:, :, None], 0)
        return width_keeping(z, frames, num_bins=self.most_bins(z.shape[1]), mean_bins=mean_bins, cost_exponent=self.options.cost_exponent)

    @torch.no_grad()
    def _width_for(self, z: Tensor, valid: Tensor | None, keep_ratio: float) -> float:
        """The width at which clips z [N, T, D] have this keep ratio."""
        o = self.options
        return functional.calibrated_width(
            z,
            num_bins=self.most_bins(z.shape[1]),
            mean_bins=keep_ratio * (z.shape[1] if valid is None else valid.double().mean().item()),
            valid=valid,
            similarity=o.similarity,
            metric=o.metric,
            noise_floor=self.floor.item() if o.noise_floor else 0.0,
            cost_exponent=o.cost_exponent,
        )

    @torch.no_grad()
    def steer(self, kept: Tensor, *, gain: float = 0.1) -> None:
        """Move the width towards the keep ratio, given a training batch's mean B' / T (a scalar tensor).

        log(width) changes by gain x (kept - keep ratio): some tens of batches correct a deviation of 0.1, and the noise
        of one batch moves the width by less than one percent. A batch whose keep ratio was drawn changes nothing.
        """
        if self.keep_ratio is not None and self.keep_range is None:
            self.width.mul_(torch.exp(gain * (kept.to(self.width) - self.keep_ratio)))

    def extra_repr(self) -> str:
        o = self.options
        return f"after={self.name}, similarity={o.similarity}, kernel={o.kernel}, scale={o.scale}, order={o.order}, num_bins={o.num_bins or 'T'}"


def _finite_frames(x: Tensor) -> Tensor:
    """Return whether all of a frame's features are finite: [N, C, T, H, W] -> [N, T] (packed: [1, M]), without a copy of x."""
    return x.detach().sum(dim=(1, 3, 4)).isfinite()


def _averaged_to(pooled: Tensor, count: int) -> Tensor:
    """Average over `count` equal intervals of time: [N, T', D] -> [N, count, D]."""
    return pooled if pooled.shape[1] == count else nn.functional.adaptive_avg_pool1d(pooled.transpose(1, 2), count).transpose(1, 2)


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
