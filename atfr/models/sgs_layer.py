"""The SGS layer: similarity embedding, sampling and aggregation of one clip batch.

The mathematics is in `atfr.models.sgs`; running what the layer returns is `atfr.models.packed`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from atfr.models import sgs

EMBEDDINGS = ("mlp", "pooled")


class NonFiniteFeatures(ValueError):
    """The features that an SGS layer was given hold a NaN or an infinity."""


@dataclass(frozen=True, kw_only=True)
class SGSOptions:
    """Where SGS sits in a network and which choices it is made of (`configs/model/sgs/`).

    The defaults are the `reference` preset: the released code, number for number.
    """

    after: str = "res2"  # the stage whose output is sampled
    before_activation: bool = True  # sample the features before that stage's last ReLU
    num_bins: int | None = None  # B, the most bins a clip may keep; None: as many as there are frames
    similarity: str = "distance_to_mean"  # distance_to_mean | anchor
    metric: str = "l2"  # l2 | l1 | cosine | mahalanobis (distance_to_mean only)
    kernel: str = "linear"  # linear | linear_normalized | mean
    scale: str = "relative"  # relative to each clip's own range | absolute: one width for all clips
    edges: str = "released"  # released (2B) | inclusive (2B - 1)
    order: str = "similarity"  # of the kept bins: similarity | time
    embedding: str = "mlp"  # mlp (learned, as published) | pooled (LayerNorm of grid x grid averages)
    embedding_dim: int = 8  # D of the mlp
    grid: int = 4  # cells a side of the pooled embedding
    width: float | None = None  # absolute scale: a fixed bin width; None: held to `target`
    target: float = 0.5  # absolute scale: mean B' / T that the width is held to

    def __post_init__(self) -> None:
        sgs.check_choices(self.similarity, self.metric, self.kernel, self.scale, self.edges, self.order)
        if self.embedding not in EMBEDDINGS:
            raise ValueError(f"sgs embedding={self.embedding!r} does not exist; choose one of {', '.join(EMBEDDINGS)}")
        if self.kernel == "mean" and self.embedding == "mlp":
            raise ValueError("sgs kernel=mean passes no gradient to a learned embedding, which would stay random: set embedding=pooled")
        if self.num_bins is not None and self.num_bins < 1:
            raise ValueError(f"sgs num_bins must be at least 1, not {self.num_bins}")
        if self.embedding_dim < 1 or self.grid < 1:
            raise ValueError(f"sgs embedding_dim ({self.embedding_dim}) and grid ({self.grid}) must be at least 1")
        if not 0 < self.target <= 1:
            raise ValueError(f"sgs target is a share of the frames, above 0 and at most 1, not {self.target}")
        if self.width is not None and not self.width > 0:
            raise ValueError(f"sgs width must be above 0, not {self.width}")


class PooledEmbedding(nn.Module):
    """z without parameters: LayerNorm of each frame's features averaged over a grid of cells."""

    def __init__(self, grid: int) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        pooled = nn.functional.adaptive_avg_pool3d(x, (None, self.grid, self.grid))  # [N, C, T, g, g]
        z = pooled.transpose(1, 2).flatten(2)  # [N, T, C g g]
        return nn.functional.layer_norm(z, z.shape[2:])


class MLPEmbedding(nn.Module):
    """z as published (paper section 3.1): average pool, Linear, ReLU, Linear, BatchNorm over D."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, max(channels // 2, 1))
        self.out = nn.Linear(max(channels // 2, 1), dim)
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, x: Tensor) -> Tensor:
        z = self.out(self.hidden(x.mean(dim=(3, 4)).transpose(1, 2)).relu())  # [N, T, D]
        return self.norm(z.transpose(1, 2)).transpose(1, 2)


class SGS(nn.Module):
    """Samples a batch of clips: [N, C, T, H, W] -> weights [N, B, T] and each clip's B'.

    With scale=absolute the bin width is one buffer shared by all clips. Unless it is fixed it must
    be calibrated before the first forward, and a trainer holds it to the target with `steer`.

    Raises:
        NonFiniteFeatures: from `forward`, naming the clip, if an input holds a NaN or an infinity.
        ValueError: from `forward`, if the width is unset.
    """

    def __init__(self, channels: int, options: SGSOptions) -> None:
        super().__init__()
        self.options = options
        self.num_bins = options.num_bins  # may be changed between batches
        if options.embedding == "mlp":
            self.embedding = MLPEmbedding(channels, options.embedding_dim)
        else:
            self.embedding = PooledEmbedding(options.grid)
        if options.scale == "absolute":
            self.register_buffer("width", torch.tensor(math.nan if options.width is None else options.width))

    @property
    def tracks_width(self) -> bool:
        """Whether the bin width follows the data and is held to `target` while training."""
        return self.options.scale == "absolute" and self.options.width is None

    def embed(self, x: Tensor) -> Tensor:
        """z [N, T, D] of features [N, C, T, H, W], in float32 even under autocast (float64 stays)."""
        with torch.autocast(x.device.type, enabled=False):
            return self.embedding(_at_least_float32(x))

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Weights [N, B, T] in float32 and the lengths B' of the clips as plain integers."""
        with torch.autocast(x.device.type, enabled=False):
            return self._sample(x)

    def _sample(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        o = self.options
        z = self.embed(x.detach() if o.embedding == "pooled" else x)
        weights, lengths = sgs.sampling_weights(
            z,
            num_bins=self.num_bins or x.shape[2],
            similarity=o.similarity,
            metric=o.metric,
            kernel=o.kernel,
            scale=o.scale,
            edges=o.edges,
            order=o.order,
            width=self.width if o.scale == "absolute" else None,
        )
        # A NaN is looked for in x, too: batch norm spreads it to the z of every clip.
        finite = x.sum(dim=(1, 2, 3, 4), dtype=torch.float32).isfinite()
        # The one synchronisation of a batch: everything the host must know crosses together.
        unset = self.width.isnan() if o.scale == "absolute" else torch.zeros_like(finite[0])
        flags = torch.stack([unset, ~z.isfinite().all()])
        *kept, unset, spoilt = torch.cat([lengths.where(finite, 0), flags]).tolist()
        if unset:
            raise ValueError(
                f"SGS after {o.after!r} has no bin width yet: calibrate it, load a trained checkpoint, or set model.sgs.width"
            )
        if 0 in kept:
            raise NonFiniteFeatures(f"SGS after {o.after!r}: the features of clip {kept.index(0)} of the batch hold a NaN or an infinity")
        if spoilt:
            raise NonFiniteFeatures(f"SGS after {o.after!r}: the similarity embedding holds a NaN or an infinity")
        return weights, tuple(kept)

    @torch.no_grad()
    def steer(self, mean_ratio: Tensor, *, gain: float = 0.1) -> None:
        """Move the width towards the target, given a training batch's mean B' / T (a scalar tensor).

        log(width) changes by gain x (ratio - target), so that a deviation of 0.1 is corrected over
        some tens of batches and the noise of one batch moves the width by less than one percent.
        """
        self.width.mul_(torch.exp(gain * (mean_ratio.to(self.width) - self.options.target)))

    def extra_repr(self) -> str:
        o = self.options
        return f"after={o.after}, similarity={o.similarity}, kernel={o.kernel}, scale={o.scale}, order={o.order}, num_bins={self.num_bins or 'T'}"


def aggregate(x: Tensor, weights: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Sum each clip's frames into its kept bins and lay the clips out one after another in time.

    x [N, C, T, H, W], weights [N, B, T] (kept bins first) -> [1, C, M = sum B', H, W], summed in
    float32 even under autocast and returned in the type of x.
    """
    n, c, t, h, w = x.shape
    longest = max(lengths)
    # Expanded by hand: fvcore leaves the channels out when it counts a broadcast matmul.
    with torch.autocast(x.device.type, enabled=False):
        frames = _at_least_float32(x).reshape(n * c, t, h * w)
        mix = weights[:, None, :longest].to(frames.dtype).expand(n, c, longest, t).reshape(n * c, longest, t)
        bins = torch.bmm(mix, frames).to(x.dtype)  # [N C, longest, HW]
    bins = bins.view(n, c, longest, h * w).transpose(0, 1).reshape(c, n * longest, h * w)
    if min(lengths) < longest:
        kept = [i * longest + b for i, length in enumerate(lengths) for b in range(length)]
        bins = bins.index_select(1, torch.tensor(kept, device=x.device))
    return bins.view(1, c, -1, h, w)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
