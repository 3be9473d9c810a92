"""The SGS layer: similarity embedding, sampling and aggregation of one batch of clips.

The mathematics is in `atfr.models.sgs.functional`; running what the layer returns is `atfr.models.packed.ops`.
"""

from __future__ import annotations

import math
from typing import Callable, NamedTuple, Sequence

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

    With scale=absolute the bin width is one buffer shared by all clips. Unless it is fixed it must
    be calibrated before the first use, and a trainer holds it to the target with `steer`.
    """

    def __init__(self, channels: int, options: SGSConfig, *, name: str, min_bins: int = 1) -> None:
        super().__init__()
        self.options, self.name, self.min_bins = options, name, min_bins
        self.gap = 0  # between clips, which in evaluation keeps them apart in all that follows; 0: each operation sees to that
        self.norms: tuple[nn.Module, ...] = ()  # the network's batch norms, of which those in training must see no gaps
        self.num_bins = options.num_bins  # may be changed between batches
        self.share: float | None = None  # of the training batches that come, where shares are `drawn`; None: torch's generator draws one for each
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SGS:
        """`model.half()` leaves this layer in float32, in which it computes: a width in half precision is another width."""

        def at_least_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        return super()._apply(at_least_float32, recurse)

    @property
    def is_baseline(self) -> bool:
        """Whether B' has nothing to do with what a clip shows."""
        return self.options.similarity in functional.BASELINES

    @property
    def tracks_width(self) -> bool:
        """Whether the bin width follows the data and is held to `target` while training."""
        return self.options.scale == "absolute" and self.options.width is None

    def most_bins(self, frames: int) -> int:
        """B for clips of `frames` features."""
        if self.num_bins is not None:
            return self.num_bins
        cuts = self.is_baseline and self.options.similarity != "none"
        return max(self.min_bins, round(self.options.target * frames)) if cuts else frames

    def forward(self, x: Tensor, segments: Segments | None = None, clips: Tensor | None = None) -> Proposal:
        """Sample features [N, C, T, H, W], or packed ones [1, C, M, H, W] with their segments.

        With embed_from=clip by what `clips` [N, 3, T', H', W'] show, where they are given: the z of a feature is that of the
        frame at its time, or the mean of several where T < T'. In float32 or float64 even under autocast.

        Raises:
            ValueError: the layer lies on another device than x, or a clip is too short for what follows.
        """
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if tensor.device != x.device:
                raise ValueError(f"SGS after {self.name!r}: its {name} is on {tensor.device} and the features are on {x.device}: move the network with model.to(device)")
        with torch.autocast(x.device.type, enabled=False):
            looks = self.options.embeds_clip and clips is not None and clips is not x  # at the input they are the same
            return self._propose(at_least_float32(x), segments, at_least_float32(clips) if looks else None)

    def _most_bins_for(self, lengths: Sequence[int], frames: int) -> int:
        if min(lengths) < self.min_bins:
            raise ValueError(f"SGS after {self.name!r}: what follows needs at least {self.min_bins} features, and a clip has {min(lengths)}")
        if self.most_bins(frames) < self.min_bins:
            raise ValueError(f"model.sgs.num_bins={self.num_bins} is too few: what follows {self.name!r} needs at least {self.min_bins}")
        return self.most_bins(frames)

    def _propose(self, x: Tensor, segments: Segments | None, clips: Tensor | None) -> Proposal:
        o = self.options
        frames = int(x.shape[2] if segments is None else segments.frames)  # a tensor while torch.jit traces
        num_bins = self._most_bins_for((frames,) if segments is None else segments.lengths, frames)
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
        if o.drawn is not None and self.training and torch.is_grad_enabled():  # not where statistics are taken
            width = self._drawn_width(z, valid)
        weights, lengths = functional.sampling_weights(
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
            min_bins=self.min_bins,
            noise_floor=self.floor if o.noise_floor else 0.0,
            cost_exponent=o.cost_exponent,
        )
        return Proposal(z, lengths.new_full((len(z),), z.shape[1]) if valid is None else valid, weights.to(x.dtype), lengths, finite)

    @torch.no_grad()
    def calibrate(self, z: Tensor, valid: Tensor) -> None:
        """Choose noise floor and width so that clips z [N, T, D], of which `valid` frames exist, keep the target share."""
        o = self.options
        if o.noise_floor:
            self.floor.fill_(functional.median_step(z, o.metric, valid))
        self.width.fill_(self._width_for(z, valid, o.target))

    @torch.no_grad()
    def _drawn_width(self, z: Tensor, valid: Tensor | None) -> Tensor | float:
        """The width for a training batch; a partition's is found without waiting for the device. A NaN is for the caller to find (`_on_host`)."""
        low, high = self.options.drawn
        share = low + (high - low) * torch.rand(()).item() if self.share is None else self.share  # drawn on the host
        z = z.nan_to_num(0, 0, 0)
        if self.options.similarity != "partition":
            return self._width_for(z, valid, share)
        frames = torch.full((len(z),), z.shape[1], device=z.device) if valid is None else valid.to(z.device, non_blocking=True)
        mean_bins = share * (z.shape[1] if valid is None else valid.double().mean().item())  # lengths are on the host
        z = z.masked_fill((torch.arange(z.shape[1], device=z.device) >= frames[:, None])[:, :, None], 0)
        return width_keeping(z, frames, num_bins=self.most_bins(z.shape[1]), mean_bins=mean_bins, cost_exponent=self.options.cost_exponent)

    @torch.no_grad()
    def _width_for(self, z: Tensor, valid: Tensor | None, share: float) -> float:
        """The width at which clips z [N, T, D] keep this share of their features."""
        o = self.options
        return functional.calibrated_width(
            z,
            num_bins=self.most_bins(z.shape[1]),
            mean_bins=share * (z.shape[1] if valid is None else valid.double().mean().item()),
            valid=valid,
            similarity=o.similarity,
            metric=o.metric,
            noise_floor=self.floor.item() if o.noise_floor else 0.0,
            cost_exponent=o.cost_exponent,
        )

    @torch.no_grad()
    def steer(self, mean_ratio: Tensor, *, gain: float = 0.1) -> None:
        """Move the width towards the target, given a training batch's mean B' / T (a scalar tensor).

        log(width) changes by gain x (ratio - target), so that a deviation of 0.1 is corrected over
        some tens of batches and the noise of one batch moves the width by less than one percent.
        Batches whose share was drawn say nothing about it.
        """
        if self.options.drawn is not None:
            return
        self.width.mul_(torch.exp(gain * (mean_ratio.to(self.width) - self.options.target)))

    def extra_repr(self) -> str:
        o = self.options
        return f"after={self.name}, similarity={o.similarity}, kernel={o.kernel}, scale={o.scale}, order={o.order}, num_bins={self.num_bins or 'T'}"


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


def sample(
    layers: Sequence[SGS],
    features: Sequence[Tensor],
    segments: Sequence[Segments | None],
    forced: Sequence[tuple[int, ...] | int] | None = None,
    clips: Tensor | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Sampled, ...]]:
    """Sample features of one batch at several places at once: packed features, and what was done.

    Args:
        features: for each layer [N, C, T, H, W], or packed [1, C, M, H, W] where it has segments.
        forced: for each layer the B' of each clip, in place of what the layer proposes: bins of
            equal size, at the same cost. An integer is an upper limit for every clip.
        clips: [N, 3, T', H', W'] for layers of embed_from=clip.

    Raises:
        NonFiniteFeatures: naming layer and clip, if features hold a NaN or an infinity.
        ValueError: a width that is unset, or forced bins that a clip has not the features for.
    """
    proposals = [layer(x, s, clips) for layer, x, s in zip(layers, features, segments)]
    lengths = _on_host(layers, proposals, checked=forced is None)
    packed, done = [], []
    for i, (layer, x, before, proposal) in enumerate(zip(layers, features, segments, proposals)):
        start = before or Segments.whole(len(x), x.shape[2], x.device)
        weights, kept = proposal.weights, lengths[i]
        if forced is not None:
            kept = tuple(min(forced[i], length) for length in start.lengths) if isinstance(forced[i], int) else tuple(forced[i])
            weights = uniform_weights(start.lengths, kept, x.device)
        # A backward pass would keep the gaps.
        gap = 0 if torch.is_grad_enabled() or any(norm.training for norm in layer.norms) else shared_gap(kept, layer.gap, x.device)
        times = mean_times(weights[:, : max(kept)], start.times[start.padded]).flatten()[unpadded(kept, x.device)]  # [sum B']
        after = Segments(kept, start.frames, times, gap)
        packed.append(aggregate(x, weights, kept, before, layout=after.layout))
        done.append(Sampled(layer.name, start.lengths, after, weights, proposal))
    return tuple(packed), tuple(done)


def _on_host(layers: Sequence[SGS], proposals: Sequence[Proposal], *, checked: bool) -> list[tuple[int, ...]]:
    """B' of each clip as plain integers: the one synchronisation of a batch, in which all errors cross, too."""
    columns = []
    for layer, (z, _, _, lengths, finite) in zip(layers, proposals):
        unset = layer.width.isnan() if layer.options.scale == "absolute" else lengths.new_zeros((), dtype=torch.bool)
        spoilt = ~z.isfinite().all()
        columns.append(torch.cat([lengths.where(finite, 0), torch.stack([unset, spoilt]).to(lengths)]))
    kept = []
    for layer, (*lengths, unset, spoilt) in zip(layers, torch.stack(columns).tolist()):
        if checked and unset:
            raise ValueError(f"SGS after {layer.name!r} has no bin width yet: calibrate it, load a trained checkpoint, or set model.sgs.width")
        if checked and 0 in lengths:
            raise NonFiniteFeatures(f"SGS after {layer.name!r}: the features of clip {lengths.index(0)} of the batch hold a NaN or an infinity")
        if checked and spoilt:
            raise NonFiniteFeatures(f"SGS after {layer.name!r}: the similarity embedding holds a NaN or an infinity")
        kept.append(tuple(lengths))
    return kept
