"""Sums each clip's frames into the bins that it keeps, and averages their times."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from atfr.models.packed.segments import Layout, Segments, unpadded


def aggregate(x: Tensor, weights: Tensor, lengths: tuple[int, ...] | None = None, before: Segments | None = None, *, layout: Layout | None = None) -> Tensor:
    """Sum each clip's frames into its kept bins, and lay the clips out one after another in time.

    Args:
        x: [N, C, T, H, W], or packed [1, C, M, H, W] with its segments in `before`.
        weights: [N, B, T], the kept bins first.
        lengths: B' of each clip; None: every clip keeps all B bins.
        layout: where the bins go if there are gaps between clips.

    Returns:
        [1, C, M', H, W] in channels-last memory and in the type of x, summed in float32 at least even under autocast.
        M' = sum B', or the slots of `layout`.
    """
    slots = None if lengths is None else unpadded(lengths, x.device)  # [M'] of the N B rows
    if slots is not None and layout is not None:
        slots = slots.index_select(0, layout.source)
    with torch.autocast(x.device.type, enabled=False):
        frames = at_least_float32(x).permute(0, 2, 3, 4, 1).flatten(2)  # [N, T, H W C] or [1, M, H W C]
        weights = (weights if lengths is None else weights[:, : max(lengths)]).to(frames.dtype)
        # Sparse sums: on CPUs 2 to 5 times as fast where lengths differ. Tracing and torch.compile get the product.
        if x.device.type == "cpu" and slots is not None and not (torch.is_grad_enabled() or torch.jit.is_tracing() or torch.compiler.is_compiling()):
            rows = _sparse_sums(frames.flatten(0, 1), weights, slots, None if before is None else before.padded)
        else:
            rows = torch.bmm(weights, frames if before is None else frames[0][before.padded]).flatten(0, 1)  # [N B, H W C]
            if layout is not None or (lengths is not None and min(lengths) < max(lengths)):
                rows = rows.index_select(0, slots)
    return rows.to(x.dtype).unflatten(1, (*x.shape[3:], x.shape[1]))[None].permute(0, 4, 1, 2, 3)


def _sparse_sums(frames: Tensor, weights: Tensor, slots: Tensor, padded: Tensor | None) -> Tensor:
    """Sum frames [N T, F] by the rows `slots` [M'] of weights [N, B, T] that are not 0: [M', F].

    Packed frames are [M, F], and `padded` [N, T] are their indices.
    """
    _, bins, steps = weights.shape
    chosen = weights.flatten(0, 1).index_select(0, slots)  # [M', T]
    slot, time = chosen.nonzero(as_tuple=True)
    frame = slots.div(bins, rounding_mode="floor").index_select(0, slot) * steps + time
    if padded is not None:
        frame = padded.flatten().index_select(0, frame)
    counts = chosen.count_nonzero(dim=1)
    return nn.functional.embedding_bag(frame, frames, counts.cumsum(0) - counts, mode="sum", per_sample_weights=chosen[slot, time])


def mean_times(weights: Tensor, times: Tensor) -> Tensor:
    """Average the times [N, T] of each bin's frames: weights [N, B, T] -> [N, B], 0 for empty bins."""
    member = (weights.detach() > 0).float()
    return (member * times[:, None]).sum(dim=2) / member.sum(dim=2).clamp(min=1)


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
