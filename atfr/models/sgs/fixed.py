"""The baselines of SGS as pure functions: bins that do not depend on what a clip shows."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BASELINES = ("uniform", "stride", "random", "none")


def baseline(similarity: str, frames: Tensor, *, num_frames: int, num_bins: int) -> tuple[Tensor, Tensor]:
    """Return bins and weights (0 or 1), both [N, T], that depend on the number of frames [N] of each clip alone.

    uniform: min(B, T) contiguous bins of equal size; stride: the middle frame of each of these;
    random: min(B, T) distinct frames, the same for all clips of this length; none: every frame.
    """
    time = torch.arange(num_frames, device=frames.device).expand(len(frames), num_frames)
    if similarity == "none":
        return time, torch.ones_like(time)
    if similarity == "random":
        chosen = _random_frames(num_frames, num_bins).to(frames.device, non_blocking=True)[frames]
        return (chosen.cumsum(dim=1) - 1).clamp(min=0), chosen
    parts = frames.clamp(max=num_bins)[:, None]
    bins = uniform_bins(frames[:, None], parts, num_frames)
    if similarity == "uniform":
        return bins, torch.ones_like(bins)
    first, after = ((b * frames[:, None] + parts - 1) // parts for b in (bins, bins + 1))  # of each frame's bin
    return bins, (time == (first + after - 1) // 2).long()


def _random_frames(num_frames: int, num_bins: int) -> Tensor:
    """Return [T + 1, T], in which row n selects min(B, n) frames of a clip of n, the same in every call."""
    chosen = torch.zeros(num_frames + 1, num_frames, dtype=torch.long)
    for n in range(1, num_frames + 1):
        generator = torch.Generator().manual_seed(n)
        chosen[n, torch.randperm(n, generator=generator)[:num_bins]] = 1
    return chosen


def uniform_bins(num_frames: int | Tensor, num_bins: int | Tensor, length: int | None = None) -> Tensor:
    """Return the bin of each frame, [T], in a cut of T frames into contiguous bins of equal size (+-1).

    With num_frames [N, 1]: [N, length], in which padding is in the last bin.
    """
    time = torch.arange(length or num_frames, device=getattr(num_frames, "device", None))
    return (time * num_bins // num_frames).clamp(max=num_bins - 1)


@lru_cache(maxsize=64)
def uniform_weights(given: tuple[int, ...], bins: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the weights [N, B, T] that average clips of `given` frames into contiguous bins of equal size, `bins` of each.

    Raises:
        ValueError: a clip has fewer frames than bins.
    """
    if len(bins) != len(given) or any(not 1 <= b <= length for b, length in zip(bins, given)):
        raise ValueError(f"clips of {given} features cannot be made to keep {bins}")
    with torch.inference_mode(False):
        weights = torch.zeros(len(given), max(bins), max(given))
        for clip, (b, length) in enumerate(zip(bins, given)):
            weights[clip, uniform_bins(length, b), torch.arange(length)] = 1
        return (weights / weights.sum(dim=2, keepdim=True).clamp(min=1)).to(device)
