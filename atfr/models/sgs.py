"""The mathematics of Similarity Guided Sampling (SGS), as pure functions.

Fayyaz et al., "3D CNNs with Adaptive Temporal Feature Resolutions", CVPR 2021, section 3.

Each of a clip's T frames has an embedding z_t in a small similarity space. Frames that are alike
fall into the same bin, a bin's output is the weighted sum of its frames, and bins that no frame
falls into are dropped: a clip keeps B' <= min(B, T) features. Two ways to say what "alike" means:

- `distance_to_mean` (the paper's released code): frames equally far from the clip's mean embedding
  share a bin, and the bins are cut relative to the clip's own largest distance.
- `anchor`: frames are taken in time order and a new bin opens when a frame is farther than `width`
  from the running mean of the open bin, so that bins are contiguous in time and their number
  follows how much the clip changes.

Every frame lies in exactly one bin (the released kernels have disjoint supports), so a sampling is
a bin index and a weight for each frame; the [N, B, T] matrix is derived from these two.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIMILARITIES = ("distance_to_mean", "anchor")
METRICS = ("l2", "l1", "cosine", "mahalanobis")
KERNELS = ("linear", "linear_normalized", "mean")
SCALES = ("relative", "absolute")
EDGES = ("released", "inclusive")
ORDERS = ("similarity", "time")

TINY = 1e-12  # keeps a square root's gradient and a division finite where all frames are identical


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
) -> tuple[Tensor, Tensor]:
    """Weights with which each clip's frames are summed into its kept bins.

    The defaults are the `reference` preset: the released code, number for number.

    Args:
        z: [N, T, D] embeddings of the frames, floating point.
        num_bins: B, the most bins a clip may keep.
        similarity, metric, kernel, scale, edges, order: see `check_choices`.
        width: for scale="absolute", the largest distance (root mean square over D) between a
            frame and its bin, the same for all clips.

    Returns:
        weights [N, B, T], a clip's kept bins first and in order, zero rows after them; and
        lengths [N] (int64), each clip's B', at least 1.

    Raises:
        ValueError: a choice that does not exist or does not fit the others.
    """
    check_choices(similarity, metric, kernel, scale, edges, order)
    if z.dim() != 3 or not z.is_floating_point():
        raise ValueError(f"z must be a floating point [N, T, D] tensor, not {z.dtype} {tuple(z.shape)}")
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, not {num_bins}")
    if similarity == "anchor":
        if width is None:
            raise ValueError("similarity=anchor needs a width, the same for all clips")
        bins, weights = anchor_bins(z, width=width, num_bins=num_bins), torch.ones_like(z[:, :, 0])
    else:
        position = relative_position(distance_to_mean(z, metric), num_bins=num_bins, edges=edges)
        bins = (position.detach() / 2).floor().long().clamp(0, num_bins - 1)  # [N, T]
        weights = linear_kernel(position, bins) if kernel.startswith("linear") else torch.ones_like(position)
    if kernel in ("linear_normalized", "mean"):
        weights = weights / frames_in_own_bin(bins, num_bins, weights)
    return compact(bins, weights, num_bins=num_bins, order=order)


def check_choices(similarity: str, metric: str, kernel: str, scale: str, edges: str, order: str) -> None:
    """Raise ValueError, naming the choice and what is possible, unless the six fit together."""
    for name, value, possible in (
        ("similarity", similarity, SIMILARITIES),
        ("metric", metric, METRICS),
        ("kernel", kernel, KERNELS),
        ("scale", scale, SCALES),
        ("edges", edges, EDGES),
        ("order", order, ORDERS),
    ):
        if value not in possible:
            raise ValueError(f"sgs {name}={value!r} does not exist; choose one of {', '.join(possible)}")
    if similarity == "anchor" and scale != "absolute":
        raise ValueError("sgs similarity=anchor compares frames with one width for all clips: set scale=absolute")
    if similarity == "anchor" and kernel != "mean":
        raise ValueError(f"sgs similarity=anchor gives no position inside a bin, so kernel={kernel} means nothing: set kernel=mean")
    if similarity == "distance_to_mean" and scale != "relative":
        raise ValueError("sgs similarity=distance_to_mean is cut relative to the clip: set scale=relative")


def distance_to_mean(z: Tensor, metric: str = "l2") -> Tensor:
    """d_t, the distance of each frame from its clip's mean embedding: [N, T, D] -> [N, T].

    As in the released code 1e-6 is added to each component of the difference (l2, l1), cosine is
    1 - cos, and mahalanobis is the squared distance under the clip's covariance (divisor T - 1).
    """
    mean = z.mean(dim=1, keepdim=True)  # [N, 1, D]
    difference = mean - z + 1e-6
    if metric == "l2":
        return (difference.square().sum(dim=2) + TINY**2).sqrt()
    if metric == "l1":
        return difference.abs().sum(dim=2)
    if metric == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(mean, z, dim=2)
    centred = z - mean
    covariance = centred.transpose(1, 2) @ centred / max(z.shape[1] - 1, 1)  # [N, D, D]
    return (centred @ torch.linalg.pinv(covariance) * centred).sum(dim=2)


def relative_position(distance: Tensor, *, num_bins: int, edges: str) -> Tensor:
    """s_t in [0, 2B]: distance [N, T] scaled by the clip's largest. Bin b is centred on 2b + 1.

    `released` puts the farthest frame on the outer edge of the last bin, where a linear kernel
    gives it no weight; `inclusive` (2B - 1) puts it on that bin's centre.
    """
    reach = 2 * num_bins if edges == "released" else 2 * num_bins - 1
    largest = distance.amax(dim=1, keepdim=True).clamp(min=TINY)
    return distance * reach / largest


def linear_kernel(position: Tensor, bins: Tensor) -> Tensor:
    """max(0, 1 + 1e-7 - |s - mu_b|) of each frame in its own bin: [N, T]."""
    return (1 + 1e-7 - (position - (2 * bins + 1)).abs()).clamp(min=0)


def anchor_bins(z: Tensor, *, width: float | Tensor, num_bins: int) -> Tensor:
    """Contiguous bins in time order, one scan over T with the batch as one tensor: [N, T] int64.

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


def frames_in_own_bin(bins: Tensor, num_bins: int, like: Tensor) -> Tensor:
    """For each frame, how many frames its bin holds: [N, T]."""
    counts = like.new_zeros(len(bins), num_bins).scatter_add_(1, bins, torch.ones_like(like))
    return counts.gather(1, bins)


def compact(bins: Tensor, weights: Tensor, *, num_bins: int, order: str) -> tuple[Tensor, Tensor]:
    """Drop the empty bins: (bins [N, T], weights [N, T]) -> (matrix [N, B, T], lengths [N]).

    `similarity` keeps the order of the bins, `time` orders them by the mean time of their frames.
    """
    member = torch.nn.functional.one_hot(bins, num_bins).transpose(1, 2).to(weights.dtype)  # [N, B, T]
    counts = member.sum(dim=2)  # [N, B]
    if order == "time":
        time = torch.arange(bins.shape[1], device=bins.device, dtype=weights.dtype)
        rank = (member * time).sum(dim=2) / counts.clamp(min=1)
    else:
        rank = torch.arange(num_bins, device=bins.device, dtype=weights.dtype).expand_as(counts)
    kept_first = rank.masked_fill(counts == 0, torch.inf).argsort(dim=1, stable=True)  # [N, B]
    matrix = (member * weights[:, None]).gather(1, kept_first[:, :, None].expand_as(member))
    return matrix, (counts > 0).sum(dim=1)


def uniform_bins(num_frames: int, num_bins: int) -> Tensor:
    """[T] bin of each frame when T frames are cut into num_bins contiguous bins of equal size (+-1)."""
    return torch.arange(num_frames) * num_bins // num_frames


def calibrated_width(z: Tensor, *, num_bins: int, mean_bins: float) -> float:
    """The width for which the clips z [N, T, D] keep `mean_bins` bins on average, by bisection.

    Mean B' falls (almost monotonically) as the width grows. Returns the wider end, so that the
    mean does not exceed what was asked for unless even the widest bin cannot reach it.
    """
    low, high = 0.0, float((z - z.mean(dim=1, keepdim=True)).square().mean(dim=2).amax().sqrt()) * 2 + TINY
    for _ in range(40):
        middle = (low + high) / 2
        mean = (anchor_bins(z, width=middle, num_bins=num_bins)[:, -1] + 1).double().mean()
        low, high = (middle, high) if mean > mean_bins else (low, middle)
    return high
