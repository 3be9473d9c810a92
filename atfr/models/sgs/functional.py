"""The mathematics of Similarity Guided Sampling (SGS), as pure functions.

Fayyaz et al., "3D CNNs with Adaptive Temporal Feature Resolutions", CVPR 2021, section 3.

Each of a clip's T frames has an embedding z_t in a small similarity space. Similar frames share a bin, a bin's output is
the weighted sum of its frames, and empty bins are dropped: a clip keeps B' <= min(B, T) features. Similar are frames that are

- `distance_to_mean` (the paper's released code): equally far from the clip's mean embedding.
- `magnitude` (the paper's text): of equal embedding length |z_t|.
- `path`: close along the clip's path through similarity space; bins are contiguous in time.
- `anchor`: consecutive and within `width` of the running mean of their bin; noise does not add up.
- `partition`: consecutive and together in the cut with the least variance within bins, at a price per bin (see `partition.py`).
- `uniform`, `stride`, `random`, `none`: baselines that do not use the embeddings.

The first three give a scalar d_t, which is cut into bins relative to each clip's largest
(scale=relative) or by one width for all clips (scale=absolute).
Every frame lies in exactly one bin (the released kernels have disjoint supports), so a sampling is
a bin index and a weight for each frame; the [N, B, T] matrix is derived from these two.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from atfr.models.sgs.fixed import BASELINES, baseline, uniform_bins
from atfr.models.sgs.partition import best_cuts, bin_counts, partition_bins

SEGMENTING = ("anchor", "partition")  # cut a clip into contiguous bins, in which frames have no position
SIMILARITIES = ("distance_to_mean", "magnitude", "path", *SEGMENTING, *BASELINES)
METRICS = ("l2", "l1", "cosine", "mahalanobis")
KERNELS = ("linear", "linear_normalized", "delta", "delta_normalized", "mean", "middle")
SCALES = ("relative", "absolute")
EDGES = ("released", "inclusive")
ORDERS = ("similarity", "time")

TINY = 1e-12  # keeps the gradient of a square root and a division finite for identical frames
LOST = 1e-3  # total weight of a clip's frames below which its content is lost


def sampling_weights(
    z: Tensor,
    *,
    num_bins: int,
    similarity: str = "distance_to_mean",
    metric: str = "l2",
    kernel: str = "linear",
    scale: str = "relative",
    edges: str = "released",
    order: str = "similarity",
    width: float | Tensor | None = None,
    valid: Tensor | None = None,
    min_bins: int = 1,
    noise_floor: float | Tensor = 0.0,
    cost_exponent: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compute the weights that sum each clip's frames into its kept bins.

    The defaults are the `reference` preset, which equals the released code but for one deviation: where all frames of a clip
    together weigh less than 1e-3, its bins are summed with the mean kernel, since the clip would vanish. (With the released
    edges, frames equally far from the mean are all on the outer edge of the last bin, where a frame weighs 1.2e-7.)

    Args:
        z: [N, T, D] embeddings of the frames. Half precision is computed in float32.
        num_bins: B, the most bins a clip may keep (`none` keeps every frame whatever B).
        similarity, metric, kernel, scale, edges, order: see the module and `check_choices`.
        width: scale=absolute only, the same for all clips: the extent of a bin in units of d, or
            for `anchor` the largest distance (root mean square over D) between a frame and its bin,
            for `partition` the square root of what a bin costs.
        valid: [N] int64, how many of the T frames of each clip exist; the rest is padding and has
            no influence. On the host it costs no synchronisation with the device.
        min_bins: a clip that would keep fewer is cut into this many contiguous bins: of equal size, or
            with `partition` those with the least variance, of a clip with fewer frames one each.
        noise_floor: path only, taken off the length of each step (see `median_step`).
        cost_exponent: partition only, how far a bin's price grows with the clip's own change (0 to 1).

    Returns:
        weights [N, B, T] (`none`: [N, max(B, T), T]) in float32 or float64, a clip's kept bins
        first and in order, zero rows after; and lengths [N] (int64), each clip's B', at least 1.
        A clip that holds a NaN or an infinity has NaN weights throughout, other clips are
        unaffected; a width or noise floor that is a NaN in a tensor gives NaN for all clips.

    Raises:
        ValueError: a choice or a value that is not possible or does not fit the others.
    """
    check_choices(similarity, metric, kernel, scale, edges, order)
    _check_values(z, num_bins, similarity, scale, width, min_bins, noise_floor, cost_exponent)
    added = 1 if similarity == "partition" else min_bins  # a partition has as many from the start
    z, mask, frames, spoilt = _existing_frames(z, valid, added)
    rows = max(num_bins, z.shape[1]) if similarity == "none" else num_bins
    if similarity in BASELINES:
        bins, weights = baseline(similarity, frames, num_frames=z.shape[1], num_bins=num_bins)
    elif similarity in SEGMENTING:
        if similarity == "anchor":
            bins = anchor_bins(z, width=width, num_bins=num_bins)
        else:
            bins = partition_bins(z, frames, width=width, num_bins=num_bins, min_bins=min_bins, cost_exponent=cost_exponent)
        weights = torch.ones_like(mask)
        spoilt = spoilt | (width != width)  # a width never set, which opens no bin
    else:
        distance = distances(z, mask, similarity=similarity, metric=metric, noise_floor=noise_floor)
        position = positions(distance, num_bins=num_bins, edges=edges, width=width)
        bins, spoilt = bins_of(position, num_bins), spoilt | ~(distance + position).isfinite().all(dim=1)
        weights = kernel_weights(position, bins, kernel)
    bins, weights, member = _complete(bins, weights.to(z.dtype), mask, frames, rows=rows, kernel=kernel, min_bins=added)
    matrix, lengths = compact(member, weights, order=order)
    return matrix.masked_fill(spoilt[:, None, None], torch.nan), lengths


def check_choices(similarity: str, metric: str, kernel: str, scale: str, edges: str, order: str) -> None:
    """Raise ValueError, naming the choice and what is possible, unless the six fit together.

    Choices without effect are ignored: metric for `magnitude`; metric, edges and order for the baselines; edges for
    scale=absolute.
    """
    names, chosen = ("similarity", "metric", "kernel", "scale", "edges", "order"), (similarity, metric, kernel, scale, edges, order)
    for name, value, possible in zip(names, chosen, (SIMILARITIES, METRICS, KERNELS, SCALES, EDGES, ORDERS)):
        if value not in possible:
            raise ValueError(f"sgs {name}={value!r} does not exist; choose one of {', '.join(possible)}")
    if similarity in BASELINES and scale != "relative":
        raise ValueError(f"sgs similarity={similarity} measures nothing that scale={scale} could cut: set scale=relative")
    if similarity in SEGMENTING and scale != "absolute":
        raise ValueError(f"sgs similarity={similarity} compares frames with one width for all clips, not scale={scale}: set scale=absolute")
    if similarity in BASELINES and kernel != "mean":
        raise ValueError(f"sgs similarity={similarity} gives no position inside a bin, so kernel={kernel} means nothing: set kernel=mean")
    if similarity in SEGMENTING and kernel not in ("mean", "middle"):
        raise ValueError(f"sgs similarity={similarity} gives no position inside a bin, so kernel={kernel} means nothing: set kernel=mean or middle")
    if kernel == "middle" and similarity not in SEGMENTING:
        raise ValueError(f"sgs kernel=middle keeps the middle frame of contiguous bins, which similarity={similarity} does not have: set another kernel")
    if similarity in SEGMENTING and metric != "l2":
        raise ValueError(f"sgs similarity={similarity} measures root mean square distances, not metric={metric}: set metric=l2")
    if similarity == "path" and metric == "mahalanobis":
        raise ValueError("sgs similarity=path measures steps, for which metric=mahalanobis is not defined: set metric=l2, l1 or cosine")


def _check_values(z, num_bins, similarity, scale, width, min_bins, noise_floor, cost_exponent) -> None:
    """Refuse impossible values; those of a width or floor in a tensor are not read, which would wait for the device."""
    if z.dim() != 3 or not z.is_floating_point():
        raise ValueError(f"z must be a floating point [N, T, D] tensor, not {z.dtype} {tuple(z.shape)}")
    if not isinstance(num_bins, (int, torch.SymInt)) or num_bins < 1:
        raise ValueError(f"sgs num_bins must be a whole number of at least 1, not {num_bins!r}")
    if not 1 <= min_bins <= num_bins:
        raise ValueError(f"sgs min_bins must be at least 1 and at most num_bins={num_bins}, not {min_bins}")
    if scale == "relative" and width is not None:
        raise ValueError("sgs width is not used by scale=relative, which cuts each clip by its own range: set scale=absolute or no width")
    if scale == "absolute" and width is None:
        raise ValueError(f"sgs similarity={similarity} with scale=absolute needs a width, the same for all clips: calibrate or set one")
    for name, value in (("width", width), ("noise_floor", noise_floor)):
        if isinstance(value, Tensor) and value.device != z.device:
            raise ValueError(f"sgs {name} is on {value.device} and z on {z.device}: put them on one device")
    if width is not None and not isinstance(width, Tensor) and not width > 0:
        raise ValueError(f"sgs width must be above 0, not {width}")
    if not isinstance(noise_floor, Tensor) and not (noise_floor > 0 and similarity == "path" or noise_floor == 0):
        raise ValueError(f"sgs noise_floor={noise_floor} with similarity={similarity}: it must be at least 0, and 0 unless similarity=path")
    if not 0 <= cost_exponent <= 1:
        raise ValueError(f"sgs cost_exponent={cost_exponent} must be from 0 to 1")


def _existing_frames(z: Tensor, valid: Tensor | None, least: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return z, in float32 at least and 0 in padding and spoilt clips; the mask [N, T] and the number [N] of the frames that
    exist; and which clips hold a NaN or an infinity [N]."""
    num_clips, num_frames = z.shape[:2]
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if valid is None:
        valid, shortest = torch.full((num_clips,), num_frames, device=z.device), num_frames
    elif valid.shape != (num_clips,) or valid.dtype != torch.int64:
        raise ValueError(f"valid must hold one int64 for each of the {num_clips} clips, not {valid.dtype} {tuple(valid.shape)}")
    else:
        shortest = min(valid.tolist(), default=num_frames)
        if (valid > num_frames).any():
            raise ValueError(f"valid announces a clip of {int(valid.max())} frames, of which z holds {num_frames}")
    if shortest < least:
        raise ValueError(f"a clip of {shortest} frames cannot give the {least} bins that are needed at least (min_bins)")
    frames = valid.to(z.device, non_blocking=True)
    mask = torch.arange(num_frames, device=z.device) < frames[:, None]
    spoilt = (~z.isfinite().all(dim=2) & mask).any(dim=1)
    return z.masked_fill(~(mask & ~spoilt[:, None])[:, :, None], 0), mask, frames, spoilt


def distances(z: Tensor, mask: Tensor, *, similarity: str, metric: str, noise_floor: float | Tensor = 0.0) -> Tensor:
    """Return d_t of the frames that exist, 0 for padding: z [N, T, D] (padding 0), mask [N, T] -> [N, T]."""
    if similarity == "distance_to_mean":
        distance = distance_to_mean(z, metric, mask)
    elif similarity == "magnitude":
        distance = _norm(z)
    else:
        # _norm gives a step of no length TINY, which must not add up over a static clip either.
        steps = (step_lengths(z, metric) - noise_floor - TINY).clamp(min=0)
        distance = torch.nn.functional.pad(steps, (1, 0)).cumsum(dim=1)
    return distance.masked_fill(~mask, 0)


def distance_to_mean(z: Tensor, metric: str, mask: Tensor) -> Tensor:
    """Return each frame's distance from its clip's mean embedding: [N, T, D] -> [N, T].

    As in the released code 1e-6 is added to each component of the difference (l2, l1), cosine is
    1 - cos, and mahalanobis is the squared distance under the clip's covariance (divisor T - 1).
    Frames outside of mask [N, T] must be 0 and count neither in the mean nor in the covariance.
    """
    exists = mask[:, :, None].to(z.dtype)  # [N, T, 1]
    count = exists.sum(dim=1, keepdim=True)  # [N, 1, 1]
    mean = z.sum(dim=1, keepdim=True) / count  # [N, 1, D]
    if metric == "l2":
        return _norm(mean - z + 1e-6)
    if metric == "l1":
        return (mean - z + 1e-6).abs().sum(dim=2)
    if metric == "cosine":
        # Not 1 - cos, which is rounding errors for similar frames.
        one, other = _norm(mean)[:, :, None], _norm(z)[:, :, None]
        apart = (mean / one - z / other).square().sum(dim=2) / 2
        return apart.masked_fill(((one <= TINY) | (other <= TINY))[:, :, 0], 1)  # a vector of no length has no direction
    centred = (z - mean) * exists
    covariance = centred.transpose(1, 2) @ centred / (count - 1).clamp(min=1)  # [N, D, D]
    return (centred @ torch.linalg.pinv(covariance) * centred).sum(dim=2)


def step_lengths(z: Tensor, metric: str) -> Tensor:
    """Return the length of the step into each frame but the first: [N, T, D] -> [N, T - 1]."""
    if metric == "l2":
        return _norm(z.diff(dim=1))
    if metric == "l1":
        return z.diff(dim=1).abs().sum(dim=2)
    # 1 - cos of unit vectors, written so that rounding gives identical frames no distance.
    return (z / _norm(z)[:, :, None]).diff(dim=1).square().sum(dim=2) / 2


def _norm(x: Tensor) -> Tensor:
    return (x.square().sum(dim=2) + TINY**2).sqrt()


def positions(distance: Tensor, *, num_bins: int, edges: str = "released", width: float | Tensor | None = None) -> Tensor:
    """Return the positions s_t in [0, 2B] of distances [N, T]; bin b is centred on 2b + 1.

    With a width they are 2 d_t / width, clamped to the centre of the last bin. Without, they are scaled by the clip's largest
    distance: `released` puts the farthest frame on the outer edge of the last bin, where a linear kernel gives it no weight;
    `inclusive` puts it on that bin's centre.
    """
    if width is not None:
        return (2 * distance / width).clamp(max=2 * num_bins - 1)
    reach = 2 * num_bins if edges == "released" else 2 * num_bins - 1
    position = distance * reach / distance.amax(dim=1, keepdim=True).clamp(min=TINY)
    return position.clamp(max=reach)  # a position rounded above it is in no bin


def bins_of(position: Tensor, num_bins: int) -> Tensor:
    """Return the bin of each position (of a NaN: the first): [N, T] -> int64 [N, T]."""
    return (position.detach() / 2).floor().nan_to_num(0).clamp(0, num_bins - 1).long()


class _Inside(torch.autograd.Function):
    """Returns 1 for every position, with the gradient 1 of the released code in place of the true 0."""

    @staticmethod
    def forward(ctx, position: Tensor) -> Tensor:
        return torch.ones_like(position)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


def kernel_weights(position: Tensor, bins: Tensor, kernel: str) -> Tensor:
    """Return the weight of each frame in its bin before normalisation, [N, T]: max(0, 1 + 1e-7 - |s - mu_b|) if linear, else 1."""
    if kernel.startswith("linear"):
        return (1 + 1e-7 - (position - (2 * bins + 1)).abs()).clamp(min=0)
    return _Inside.apply(position) if kernel.startswith("delta") else torch.ones_like(position)


def anchor_bins(z: Tensor, *, width: float | Tensor, num_bins: int) -> Tensor:
    """Return contiguous bins, [N, T] int64, from one scan over T for the whole batch.

    A new bin opens when the root mean square difference between a frame and the running mean of
    the open bin exceeds `width`; once B bins are open, the last one takes all frames that follow.
    """
    anchor, bins = z[:, 0], [z.new_zeros(len(z), dtype=torch.long)]
    count = z.new_ones(len(z), 1)
    for frame in z.unbind(dim=1)[1:]:  # [N, D]
        step = frame - anchor
        opens = (step.square().mean(dim=1).sqrt() > width) & (bins[-1] < num_bins - 1)  # [N]
        bins.append(bins[-1] + opens)
        count = torch.where(opens[:, None], 1.0, count + 1)
        anchor = anchor + step / count  # a count of 1 restarts the mean at this frame
    return torch.stack(bins, dim=1)


def _members(bins: Tensor, mask: Tensor, rows: int) -> Tensor:
    """Return whether each frame exists and is in the bin: [N, rows, T]."""
    return (bins[:, None] == torch.arange(rows, device=bins.device)[:, None]) & mask[:, None]


def _complete(
    bins: Tensor, weights: Tensor, mask: Tensor, frames: Tensor, *, rows: int, kernel: str, min_bins: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise weights [N, T]; use the mean kernel for lost clips and uniform bins for clips with fewer than min_bins.

    Returns the bins [N, T], the weights [N, T], and the members [N, rows, T] of the bins.
    """
    member = _members(bins, mask, rows)
    averaged = ((weights.detach() * mask).sum(dim=1) < LOST)[:, None]  # [N, 1]
    if min_bins > 1:
        few = (member.any(dim=2).sum(dim=1) < min_bins)[:, None]
        bins = torch.where(few, uniform_bins(frames[:, None], min_bins, bins.shape[1]), bins)
        member, averaged = _members(bins, mask, rows), averaged | few
    weights = weights.masked_fill(averaged, 1)
    if kernel == "middle":
        weights = weights * is_middle(member, bins)
    count = (member & (weights > 0)[:, None]).sum(dim=2).gather(1, bins).clamp(min=1)  # [N, T]
    if kernel in ("linear", "delta"):
        count = count.masked_fill(~averaged, 1)
    return bins, weights / count, member


def is_middle(member: Tensor, bins: Tensor) -> Tensor:
    """Return whether each frame is the middle one of its bin, the earlier one of two: members [N, B, T], bins [N, T] -> [N, T]."""
    rank = member.cumsum(dim=2).gather(1, bins[:, None])[:, 0]  # from 1, of each frame in its bin
    return rank == (member.sum(dim=2).gather(1, bins) + 1) // 2


def compact(member: Tensor, weights: Tensor, *, order: str) -> tuple[Tensor, Tensor]:
    """Drop the empty bins: (members [N, B, T], weights [N, T]) -> (matrix [N, B, T], lengths [N]).

    `order`: "similarity" keeps the order of the bins, "time" sorts them by the mean time of their frames.
    """
    counts, member = member.sum(dim=2), member.to(weights.dtype)  # [N, B], [N, B, T]
    rank = torch.arange(member.shape[1], device=weights.device, dtype=weights.dtype).expand_as(counts)
    if order == "time":
        time = torch.arange(weights.shape[1], device=weights.device, dtype=weights.dtype)
        rank = (member * time).sum(dim=2) / counts.clamp(min=1)
    kept_first = rank.masked_fill(counts == 0, torch.inf).argsort(dim=1, stable=True)  # [N, B]
    matrix = (member * weights[:, None]).gather(1, kept_first[:, :, None].expand_as(member))
    return matrix, (counts > 0).sum(dim=1)


def calibrated_width(
    z: Tensor,
    *,
    num_bins: int,
    mean_bins: float,
    valid: Tensor | None = None,
    similarity: str = "anchor",
    metric: str = "l2",
    noise_floor: float = 0.0,
    cost_exponent: float = 0.0,
) -> float:
    """Return the largest width at which the clips z [N, T, D] keep `mean_bins` bins on average.

    The mean never exceeds `mean_bins`, unless that is below one bin a clip. If no width reaches it, the width that keeps most
    is returned.

    Raises:
        ValueError: as `sampling_weights`; or z holds a NaN or an infinity.
    """
    check_choices(similarity, metric, "mean", "absolute", "released", "similarity")
    _check_values(z, num_bins, similarity, "absolute", 1.0, 1, noise_floor, cost_exponent)
    z, mask, frames, spoilt = _existing_frames(z.detach(), valid)
    if similarity == "partition":
        least, _ = best_cuts(z, frames, num_bins=num_bins)
        distance = least[:, :1] ** ((1 - cost_exponent) / 2)  # a higher price than E_1 opens no second bin
    elif similarity == "anchor":
        distance = z.square().mean(dim=2).sqrt()  # twice the largest norm bounds the distance of two frames
    else:
        distance = distances(z, mask, similarity=similarity, metric=metric, noise_floor=noise_floor)
    high = 4 * float(distance.amax()) + TINY  # gives one bin a clip
    if spoilt.any() or not math.isfinite(high):
        raise ValueError("the embeddings to calibrate an sgs width on hold a NaN or an infinity")

    def mean_at(width: float) -> float:
        if similarity == "partition":
            return bin_counts(least, width=width, cost_exponent=cost_exponent).double().mean().item()
        if similarity == "anchor":
            bins = anchor_bins(z, width=width, num_bins=num_bins)
        else:
            bins = bins_of(positions(distance, num_bins=num_bins, width=width), num_bins)
        return _members(bins, mask, num_bins).any(dim=2).sum(dim=1).double().mean().item()

    most = 0.0, high
    for _ in range(120):  # from large widths: at small ones B' falls again, as many frames share the last bin
        low = high / 2**0.25
        mean = mean_at(low)
        if mean > mean_bins:
            break
        most, high = max(most, (mean, low)), low
    else:
        return most[1]
    for _ in range(11):  # to 1e-4: closer, rounding would decide B' of frames that are exactly a width away
        middle = (low + high) / 2
        low, high = (middle, high) if mean_at(middle) > mean_bins else (low, middle)
    return high


def median_step(z: Tensor, metric: str = "l2", valid: Tensor | None = None) -> float:
    """Return the (lower) median length of all clips' steps, 0 without steps: a noise floor for `path`."""
    check_choices("path", metric, "mean", "absolute", "released", "similarity")
    z, mask, _, spoilt = _existing_frames(z.detach(), valid)
    if spoilt.any():
        raise ValueError("the embeddings to measure an sgs noise floor on hold a NaN or an infinity")
    steps = step_lengths(z, metric)[mask[:, 1:]]
    return steps.median().item() if len(steps) else 0.0
