"""Checks of the Triton kernel that cuts, on a GPU, or on the CPU in a process in which Triton interprets it."""

from __future__ import annotations

import traceback
from dataclasses import replace

import pytest
import torch
from cuts_by_trial import bins_by_trial, left_over
from torch import Tensor

from atfr.models.packed.segments import Segments
from atfr.models.sgs import layer
from atfr.models.sgs.config import SGSConfig
from atfr.models.sgs.functional import sampling_weights
from atfr.models.sgs.layer import SGS
from atfr.models.sgs.partition import best_cuts, partition_bins
from atfr.models.sgs.sampling import NonFiniteFeatures, sample


def without_padding(z: Tensor, frames: Tensor) -> Tensor:
    return z.masked_fill(torch.arange(z.shape[1])[None, :, None] >= frames[:, None, None], 0)


def check_trial(device: str) -> None:
    from atfr.models.sgs.partition_kernel import cut

    frames = torch.tensor([7, 4, 6, 3])
    found = set()
    for least, most, exponent in ((1, 7, 0.0), (1, 7, 1.0), (1, 3, 0.25), (3, 9, 0.5), (5, 5, 0.0)):
        z, times, width = torch.randn(4, 7, 3).cumsum(dim=1), torch.rand(4, 7).cumsum(dim=1), torch.tensor(0.6)
        done = cut(z.to(device), width=width.to(device), frames=frames.to(device), times=times.to(device), num_bins=most, min_bins=least, cost_exponent=exponent)
        for n, length in enumerate(frames.tolist()):
            clip = z[n, :length].double()
            bins = bins_by_trial(clip, width=width.item(), cost_exponent=exponent, least=min(least, length), most=most)
            kept = bins[-1] + 1
            assert done.bins[n].tolist() == bins + [kept - 1] * (7 - length)
            assert done.lengths[n] == done.report[n] == kept
            members = [[t for t in range(length) if bins[t] == b] for b in range(kept)]
            expected = [[1 / len(bin) if t in bin else 0.0 for t in range(7)] for bin in members] + [[0.0] * 7] * (most - kept)
            torch.testing.assert_close(done.weights[n].cpu(), torch.tensor(expected))
            middles = [sum(times[n, t].item() for t in bin) / len(bin) for bin in members] + [0.0] * (most - kept)
            torch.testing.assert_close(done.times[n].cpu(), torch.tensor(middles))
            assert done.least[n, 0].item() == pytest.approx(left_over(clip, [0, length]), rel=1e-4)
            assert done.least[n, length:].isinf().all() and done.least[n, : min(length, most)].isfinite().all()
            found.add(kept)
    assert len(found) > 2


def check_plain(device: str) -> None:
    """Also middle frames, clips of equal frames, whose cuts cost the same, and more features than a block of the kernel takes at once."""
    from atfr.models.sgs.partition_kernel import cut

    for steps, dim, most, least, exponent, kernel in ((40, 20, 10, 1, 0.5, "mean"), (12, 70, 14, 3, 1.0, "middle")):
        frames = torch.tensor([steps, steps - 3, 4, steps, steps])
        z = torch.randn(5, steps, dim).cumsum(dim=1)
        z[3] = z[3, :1]  # equal frames
        z[4] = z[4, :2].repeat_interleave(torch.tensor([5, steps - 5]), 0)  # two kinds of equal frames
        width = torch.tensor(0.5)
        done = cut(z.to(device), width=width.to(device), frames=frames.to(device), num_bins=most, min_bins=least, cost_exponent=exponent, middle=kernel == "middle")
        z = without_padding(z, frames)
        choice = dict(num_bins=most, min_bins=least, cost_exponent=exponent)
        weights, lengths = sampling_weights(z, width=width, valid=frames, similarity="partition", kernel=kernel, scale="absolute", order="time", **choice)
        assert done.lengths.tolist() == done.report.tolist() == lengths.tolist()
        torch.testing.assert_close(done.weights.cpu(), weights)
        assert done.bins.cpu().equal(partition_bins(z, frames, width=width, **choice))
        expected, _ = best_cuts(z.double(), frames, num_bins=most)
        torch.testing.assert_close(done.least.cpu().double(), expected, rtol=1e-4, atol=1e-5 * expected[:, 0].max().item())
        assert lengths[3] == least and lengths[4] == max(least, 2)
        member = weights > 0
        times = (member * torch.arange(steps)).sum(dim=2) / member.sum(dim=2).clamp(min=1)
        torch.testing.assert_close(done.times.cpu(), times)


def check_spoilt(device: str) -> None:
    from atfr.models.sgs.partition_kernel import cut

    frames = torch.tensor([9, 9, 9, 5])
    z = torch.randn(4, 9, 20)
    expected = cut(z.to(device), width=torch.tensor(0.5, device=device), frames=frames.to(device), num_bins=4, min_bins=2)
    spoilt = z.clone()
    spoilt[0, 3, 19], spoilt[2, 8, 0] = torch.nan, -torch.inf
    spoilt[3, 5:] = torch.nan  # padding
    found = cut(spoilt.to(device), width=torch.tensor(0.5, device=device), frames=frames.to(device), num_bins=4, min_bins=2)
    assert found.report.tolist() == [0, expected.lengths[1], 0, expected.lengths[3]]
    assert found.lengths.tolist() == [2, expected.lengths[1], 2, expected.lengths[3]]  # as many as there must be
    assert found.weights[0].isnan().all() and found.weights[2].isnan().all()
    for one, other in zip(found, expected):
        torch.testing.assert_close(one[1::2], other[1::2])
    unset = cut(z.to(device), width=torch.tensor(torch.nan, device=device), num_bins=2)
    assert unset.report.tolist() == [-1] * 4 and unset.weights.isnan().all()


def check_schema(device: str) -> None:
    """Shapes, types and strides of the results are those that torch is told for fake tensors."""
    from atfr.models.sgs.partition_kernel import _cut

    z, width = torch.randn(2, 6, 5, device=device), torch.tensor(0.5, device=device)
    frames, times = torch.tensor([6, 4], device=device), torch.rand(2, 6, device=device)
    torch.library.opcheck(_cut, (z, width, None, None, 3, 1, 0.5, False), test_utils="test_faketensor")
    torch.library.opcheck(_cut, (z, width, frames, times, 3, 2, 0.5, True), test_utils="test_schema")


def check_layer(device: str) -> None:
    """Packed features, their times and errors are those of the plain way; also of a layer behind another one."""
    options = SGSConfig.from_preset("atfr", width=0.5, grid=2)
    one = SGS(3, options, name="stem").to(device)
    clips = torch.randn(3, 3, 12, 8, 8, device=device).cumsum(dim=2)
    features = torch.randn(3, 6, 6, 4, 4, device=device)
    before = Segments((5, 2, 6), 12, torch.arange(13.0, device=device) ** 1.5)
    packed = torch.randn(1, 6, 13, 4, 4, device=device).cumsum(dim=2)
    for x, segments, clip in ((features, None, clips), (packed, before, None)):
        results = []
        for kernel in (False, True):
            layer.triton_runs = lambda device: kernel
            results.append(sample([one], [x], [segments], None, clip))
        ((plain,), (wanted,)), ((kept,), (done,)) = results
        assert wanted.proposal.times is None and done.proposal.times is not None
        assert done.segments.lengths == wanted.segments.lengths and len(set(done.segments.lengths)) > 1
        torch.testing.assert_close(kept, plain)
        torch.testing.assert_close(done.segments.times, wanted.segments.times)
        assert done.given == wanted.given and done.assignment.equal(wanted.assignment)
        assert done.proposal.valid.equal(wanted.proposal.valid)
    clips[1, 0, 3, 2, 2] = torch.inf
    with pytest.raises(NonFiniteFeatures, match="the features of clip 1 of the batch"):
        sample([one], [features], [None], None, clips)
    never = SGS(3, replace(options, width=None), name="stem").to(device)
    with pytest.raises(ValueError, match="is not calibrated"):
        sample([never], [features], [None], None, clips)


CHECKS = {check.__name__: check for check in (check_trial, check_plain, check_spoilt, check_schema, check_layer)}


def seeded(name: str, device: str) -> None:
    torch.manual_seed(0)
    CHECKS[name](device)


def failures() -> dict[str, str]:
    """Run all checks on the CPU: what failed in each of them, "" for nothing."""
    failed = dict.fromkeys(CHECKS, "")
    for name in CHECKS:
        try:
            seeded(name, "cpu")
        except BaseException:
            failed[name] = traceback.format_exc()
    return failed
