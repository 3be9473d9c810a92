"""Sums of frames into bins and their mean times, against a loop over clips, bins and frames."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from atfr.models.packed.segments import Segments, Window, layout
from atfr.models.sgs.aggregate import aggregate, mean_times

FRAMES, KEPT = (5, 2, 6), (3, 1, 4)  # of three clips


def clips_and_weights() -> tuple[list[Tensor], Tensor]:
    """Clips [C, T_n, H, W], and weights [N, B, T] of which some are 0."""
    clips = [torch.randn(4, frames, 2, 3) for frames in FRAMES]
    weights = torch.zeros(3, 5, 6)
    for row, frames, kept in zip(weights, FRAMES, KEPT):
        row[:kept, :frames] = (torch.rand(kept, frames) - 0.4).clamp(min=0)
        row[:kept, 0] += 0.1
    return clips, weights


def looped(clips: list[Tensor], weights: Tensor) -> Tensor:
    """[C, sum B', H, W]"""
    bins = [sum(w * clip[:, t] for t, w in enumerate(row[b, : clip.shape[1]])) for clip, row, kept in zip(clips, weights, KEPT) for b in range(kept)]
    return torch.stack(bins, dim=1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("grad", [False, True])  # on CPUs there are two ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("gap", [0, 1])
def test_bins_are_the_weighted_sums_of_their_frames(packed, grad, dtype, gap):
    clips, weights = clips_and_weights()
    clips = [clip.to(dtype) for clip in clips]
    if packed:
        x, before = torch.cat(clips, dim=1)[None], Segments(FRAMES, 6, torch.zeros(sum(FRAMES)))
    else:
        x, before = torch.stack([torch.nn.functional.pad(clip, (0, 0, 0, 0, 0, 6 - clip.shape[1])) for clip in clips]), None
    gaps = layout(KEPT, Window(2 * gap + 1, padding=gap), x.device) if gap else None
    with nullcontext() if grad else torch.no_grad():
        out = aggregate(x.requires_grad_(grad), weights, KEPT, before, layout=gaps)
    assert out.dtype == dtype and out.requires_grad == grad and out.permute(0, 2, 3, 4, 1).is_contiguous()
    found = out[0] if gaps is None else out[0].index_select(1, gaps.kept)
    torch.testing.assert_close(found, looped([clip.double() for clip in clips], weights).to(dtype))  # once rounded


def test_without_lengths_all_bins_are_kept():
    x, weights = torch.randn(2, 3, 4, 2, 2), torch.rand(2, 3, 4)
    expected = torch.einsum("nbt,ncthw->cnbhw", weights, x).flatten(1, 2)
    torch.testing.assert_close(aggregate(x, weights)[0], expected)


def test_gradients_are_those_of_the_loop():
    clips, weights = clips_and_weights()
    x, before = torch.cat(clips, dim=1)[None].requires_grad_(), Segments(FRAMES, 6, torch.zeros(sum(FRAMES)))
    weights.requires_grad_()
    found = torch.autograd.grad(aggregate(x, weights, KEPT, before).square().sum(), (x, weights))
    expected = torch.autograd.grad(looped(list(x[0].split(FRAMES, dim=1)), weights).square().sum(), (x, weights))
    torch.testing.assert_close(found[0], expected[0])
    for gradient, wanted, frames, kept in zip(found[1], expected[1], FRAMES, KEPT):  # weights of padding are constant
        torch.testing.assert_close(gradient[:kept, :frames], wanted[:kept, :frames])


def test_the_time_of_a_bin_is_the_mean_of_its_frames():
    weights = torch.tensor([[[0.5, 0.5, 0, 0], [0, 0, 2, 1e-7], [0, 0, 0, 0]]])
    torch.testing.assert_close(mean_times(weights, torch.tensor([[0.0, 2, 3, 5]])), torch.tensor([[1.0, 4, 0]]))
