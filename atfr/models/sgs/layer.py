"""The SGS layer: proposes how to sample a batch of clips. The mathematics is in `atfr.models.sgs.functional`."""

from __future__ import annotations

import math
from typing import Callable, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from atfr.models.packed.kernels.support import triton_runs
from atfr.models.packed.segments import Segments
from atfr.models.sgs import functional
from atfr.models.sgs.aggregate import at_least_float32
from atfr.models.sgs.config import SGSConfig
from atfr.models.sgs.embedding import MLPEmbedding, PooledEmbedding
from atfr.models.sgs.glance import Glance, GlanceEmbedding
from atfr.models.sgs.partition import MOST_FRAMES, width_keeping
from atfr.models.sgs.time_embedding import TimeEmbedding

NOT_FINITE, NO_WIDTH, BAD_EMBEDDING = 0, -1, -2  # why a clip cannot be sampled, in `Proposal.report`


class Proposal(NamedTuple):
    """What a layer wants to do with a batch, still on the device."""

    z: Tensor  # [N, T, D] embeddings
    valid: Tensor  # [N] how many of the T frames each clip has, on the host
    weights: Tensor  # [N, B, T] kept bins first, zero rows after
    lengths: Tensor  # [N] B' of each clip
    report: Tensor  # [N] B' of each clip, or NOT_FINITE (what is embedded holds a NaN or an infinity), NO_WIDTH or BAD_EMBEDDING
    times: Tensor | None = None  # [N, B] the mean time of each bin's frames; None: not computed yet
    glance: Glance | None = None  # what a GlanceEmbedding is trained by


class SGS(nn.Module):
    """Proposes how to sample a batch of clips.

    With scale=absolute the bin width is one buffer shared by all clips. A layer that follows a budget must be calibrated
    before its first use; a trainer then holds the width to the budget with `steer`.

    Args:
        channels: of what it embeds.
        num_classes: of the clips; embedding=glance needs it.
        sampled_channels: of the features that it samples; None: the same.
        min_bins: the fewest features that the layers behind it can run on.
        depth: how many SGS layers lie in front of it.
        gap: filler frames between packed clips in evaluation; 0: each operation pads for itself.
        norms: the network's batch norms, which must see no filler frames while they train.
    """

    def __init__(
        self, channels: int, options: SGSConfig, *, name: str, num_classes: int = 0, sampled_channels: int | None = None, min_bins: int = 1, depth: int = 0, gap: int = 0, norms: Sequence[nn.Module] = ()
    ) -> None:
        super().__init__()
        self.options, self.name, self.min_bins, self.depth, self.gap = options, name, min_bins, depth, gap
        self.norms = tuple(norms)  # a tuple: they are registered in the network, and not a second time here
        self.keep_ratio = options.keep_ratio  # mean B' / T that the layer is held to; None before `set_budget`
        self.keep_range: tuple[float, float] | None = None  # of training batches, from `gflops_range`
        self._drawn_ratio: float | None = None  # keep ratio of the next training batch; None: torch's generator draws it
        if self.is_baseline:
            self.embedding = None
        elif options.embedding == "pooled":
            self.embedding = PooledEmbedding(options.grid)
        elif options.embedding == "glance":
            self.embedding = GlanceEmbedding(channels, options.embedding_dim, options.grid, num_classes)
        else:
            self.embedding = MLPEmbedding(channels, options.embedding_dim)
            self.embedding.requires_grad_(options.embedding == "mlp")
        self.time = TimeEmbedding(sampled_channels or channels) if options.time_embedding else None
        if self.has_width:
            self.register_buffer("width", torch.tensor(math.nan if options.width is None else options.width))
        if options.noise_floor:
            self.register_buffer("floor", torch.tensor(math.nan))

    def get_extra_state(self) -> Tensor:
        """Return the budget for `state_dict`: keep ratio and range [3], 0 where not set."""
        return torch.tensor([self.keep_ratio or 0.0, *(self.keep_range or (0.0, 0.0))], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the budget from `state_dict`."""
        ratio, low, high = state.tolist()
        self.keep_ratio = ratio or None
        self.keep_range = (low, high) if low else None

    def set_budget(self, keep_ratio: float, keep_range: tuple[float, float] | None = None) -> None:
        """Keep this share of the features on average from the next calibration on; where all clips keep equally many, from the next batch on.

        Args:
            keep_ratio: mean B' / T, above 0 and at most 1.
            keep_range: the smallest and the largest keep ratio of training batches, where they are drawn.

        Raises:
            ValueError: the options of this layer leave B' to something else than a budget.
        """
        o = self.options
        if not o.follows_budget:
            fixed = "num_bins" if o.has_fixed_cost and o.num_bins is not None else "width" if o.width is not None else f"similarity={o.similarity}, scale={o.scale}"
            raise ValueError(
                f"SGS after {self.name!r} follows no budget, since its {fixed} decides B': scale=absolute without a width does, and what keeps equally many features of all clips (uniform, stride, random, same_number) without num_bins"
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
        """Whether what is kept does not depend on what a clip shows."""
        return self.options.is_baseline

    @property
    def has_width(self) -> bool:
        """Whether one bin width for all clips decides B'."""
        return self.options.scale == "absolute" and not self.options.has_fixed_cost

    @property
    def tracks_width(self) -> bool:
        """Whether the bin width is calibrated and held to a budget while training."""
        return self.options.follows_budget and self.has_width

    @property
    def lacks_budget(self) -> bool:
        """Whether all clips keep equally many features, of a number that no calibration has set yet."""
        return self.options.has_fixed_cost and self.options.follows_budget and self.keep_ratio is None

    def most_bins(self, frames: int, min_bins: int = 1) -> int:
        """Return B for clips of `frames` features before all layers, at least `min_bins` where a keep ratio decides it."""
        if self.options.num_bins is not None:
            return self.options.num_bins
        if not self.options.has_fixed_cost or self.keep_ratio is None:
            return frames
        return max(self.min_bins, min_bins, round(self.keep_ratio ** (self.depth + 1) * frames))

    def embeds(self, clips: Tensor | None, x: Tensor | int) -> bool:
        """Return whether the layer embeds `clips`, not the features x; at the input they are the same."""
        return self.options.embeds_clip and clips is not None and clips is not x

    def forward(self, x: Tensor | int, segments: Segments | None = None, clips: Tensor | None = None, min_bins: int = 1) -> Proposal:
        """Propose how to sample features [N, C, T, H, W], or packed ones [1, C, M, H, W] with their segments.

        With embed_from=clip the embedding is that of `clips` [N, 3, T', H', W'], where they are given: z of a feature is
        that of the frame at its time, or the mean of several where T < T'. In float32 or float64 even under autocast.

        Args:
            x: the features; their number T is enough where the clips are embedded.
            min_bins: the fewest features that each clip of this batch must keep, beyond those that the layer needs anyway.

        Raises:
            ValueError: the layer lies on another device than x, or a clip is too short for the layers behind.
        """
        source = clips if self.embeds(clips, x) else x
        assert isinstance(source, Tensor)
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if tensor.device != source.device:
                raise ValueError(f"SGS after {self.name!r}: its {name} is on {tensor.device} and the features are on {source.device}: move the network with model.to(device)")
        frames = x if isinstance(x, int) else int(x.shape[2] if segments is None else segments.frames)  # a tensor while torch.jit traces
        with torch.autocast(source.device.type, enabled=False):
            return self._propose(at_least_float32(source), segments, frames, max(self.min_bins, min_bins))

    def _most_bins_for(self, lengths: Sequence[int], frames: int, least: int) -> int:
        most = self.most_bins(frames, least)
        if min(lengths) < least:
            raise ValueError(f"SGS after {self.name!r}: the layers behind need at least {least} features, and a clip has {min(lengths)}")
        if most < least:
            raise ValueError(f"sgs.num_bins={self.options.num_bins} is too few: the layers behind {self.name!r} need at least {least}")
        return most

    def _propose(self, x: Tensor, segments: Segments | None, frames: int, least: int) -> Proposal:
        """Propose how to sample clips of at most `frames` features by the features, or the clips, x."""
        num_bins = self._most_bins_for((frames,) if segments is None else segments.lengths, frames, least)
        if self.embedding is None:  # a baseline, which looks at the number of frames alone
            pooled, z = None, x.new_zeros(*(x.shape[::2][:2] if segments is None else segments.padded.shape), 1)  # [N, T, 1]
        else:
            pooled = _averaged_to(self.embedding.pool(x), frames if segments is None else x.shape[2])  # [N, T, ...] or [1, M, ...]
            z = self.embedding(pooled)
            z = z if segments is None else z[0][segments.padded]
        lengths = (frames,) * len(z) if segments is None else segments.lengths
        valid = None if segments is None else torch.tensor(lengths)  # on the host, where it is checked
        glance = self._glance(z, segments)
        width = self.width if self.has_width else None
        if self.options.same_number:  # at any price
            width, least = z.new_ones(()), num_bins
        elif self.keep_range is not None and self.training and torch.is_grad_enabled():  # not where statistics are taken
            width = self._drawn_width(z, valid, self.keep_range)
        if self._runs_kernel(z):
            return self._cut_on_gpu(z, segments, torch.tensor(lengths), width=width, num_bins=num_bins, least=least)._replace(glance=glance)
        # Batch norm spreads a NaN to the z of every clip, so the clip at fault shows in what was pooled.
        finite = finite_frames(x) if pooled is None else pooled.isfinite().all(dim=2)
        finite = (finite if segments is None else finite[0][segments.padded]).all(dim=1)
        weights, kept = self._sampling(z, valid, width=width, num_bins=num_bins, least=least)
        report = kept.where(z.isfinite().all(), BAD_EMBEDDING).where(finite, NOT_FINITE)
        if self.has_width:
            report = report.masked_fill(self.width.isnan(), NO_WIDTH)
        return Proposal(z, torch.tensor(lengths), weights.to(x.dtype), kept, report, glance=glance)

    def _glance(self, z: Tensor, segments: Segments | None) -> Glance | None:
        """Return what an embedding that learns is trained by, of z [N, T, D]; only in a training step."""
        if not self._learns:
            return None
        assert isinstance(self.embedding, GlanceEmbedding)
        time = torch.arange(z.shape[1], device=z.device)
        return self.embedding.glance(z, (time < segments.counts[:, None]) if segments is not None else (time >= 0).expand(len(z), -1))

    def require_no_glance(self) -> None:
        """Raise ValueError in a training step of an embedding that learns; for a step whose loss cannot contain that of the embedding."""
        if self._learns:
            raise ValueError(
                f"SGS after {self.name!r}: embedding=glance learns by a loss of its own: call the model with return_sampling=True and"
                " add sampling.glance_loss(loss, targets) to the loss, or freeze it with requires_grad_(False)"
            )

    @property
    def _learns(self) -> bool:
        return isinstance(self.embedding, GlanceEmbedding) and self.embedding.learns and self.training and torch.is_grad_enabled()

    def _runs_kernel(self, z: Tensor) -> bool:
        """Return whether z is cut on a GPU by one kernel: the default way of sampling, for clips that it can take."""
        alone = isinstance(self.embedding, (PooledEmbedding, GlanceEmbedding))  # which give a NaN to the clip alone that holds one
        small = z.dtype == torch.float32 and z.shape[1] <= MOST_FRAMES
        return alone and small and self.options.similarity == "partition" and triton_runs(z.device)

    def _cut_on_gpu(self, z: Tensor, segments: Segments | None, valid: Tensor, *, width: Tensor, num_bins: int, least: int) -> Proposal:
        from atfr.models.sgs.partition_kernel import cut  # which needs Triton

        given = {} if segments is None else {"frames": segments.counts, "times": segments.times[segments.padded]}
        done = cut(z, width=width, num_bins=num_bins, min_bins=least, cost_exponent=self.options.cost_exponent, middle=self.options.kernel == "middle", **given)
        return Proposal(z, valid, done.weights, done.lengths, done.report, done.times)

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
            noise_floor=self.floor.to(z.device) if o.noise_floor else 0.0,  # z that is gathered for a calibration is on the host
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
        return f"after={self.name}, similarity={o.similarity}, kernel={o.kernel}, scale={o.scale}, order={o.order}, num_bins={o.num_bins or 'T'}" + (", same_number=True" if o.same_number else "")


def finite_frames(x: Tensor) -> Tensor:
    """Return whether all of a frame's features are finite: [N, C, T, H, W] -> [N, T] (packed: [1, M]), without a copy of x."""
    return x.detach().sum(dim=(1, 3, 4), dtype=torch.promote_types(x.dtype, torch.float32)).isfinite()


def _averaged_to(pooled: Tensor, count: int) -> Tensor:
    """Average over `count` equal intervals of time: [N, T', D] -> [N, count, D]."""
    return pooled if pooled.shape[1] == count else nn.functional.adaptive_avg_pool1d(pooled.transpose(1, 2), count).transpose(1, 2)
