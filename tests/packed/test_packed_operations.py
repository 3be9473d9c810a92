"""Each packed operation against its module run on every clip alone."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Callable, NamedTuple

import pytest
import torch
from fvcore.nn.squeeze_excitation import SqueezeExcitation
from pytorchvideo.layers.nonlocal_net import create_nonlocal
from tiers import slow_but
from torch import Tensor, nn

from atfr.models.packed import ops
from atfr.models.packed.segments import Segments, Window, rows_of

CPU = torch.device("cpu")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}
# Uneven, with clips of one feature first, inside and last; of one length; a single clip.
LENGTHS = [(4, 1, 6, 2), (1, 7, 1, 1, 3), (3, 3), (1, 1, 1), (5,), (6, 5, 1)]


def clips_of(lengths: tuple[int, ...], channels: int = 4, *, memory: str = "channels_last", dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(1, channels, sum(lengths), 4, 4, dtype=dtype).contiguous(memory_format=FORMATS[memory])


def segments_of(lengths: tuple[int, ...]) -> Segments:
    return Segments(lengths, max(lengths), torch.cat([torch.arange(n, dtype=torch.float32) for n in lengths]))


def each_alone(run: nn.Module, x: Tensor, lengths: tuple[int, ...]) -> list[Tensor]:
    """The module's output for each clip by itself.

    Torch's average pool refuses fewer features than its kernel has even where its padding makes up
    for them; here the padding in time is made by hand.
    """
    pieces = [piece.contiguous() for piece in x.split(lengths, dim=2)]
    if isinstance(run, nn.AvgPool3d) and ops.window_of(run).padding:
        padding, *space = run.padding
        run = nn.AvgPool3d(run.kernel_size, run.stride, (0, *space), divisor_override=run.divisor_override)
        pieces = [nn.functional.pad(piece, (0, 0, 0, 0, padding, padding)) for piece in pieces]
    return [run(piece) for piece in pieces]


def check(run: Callable[[Tensor, Segments], Tensor], module: nn.Module, lengths: tuple[int, ...], memory: str) -> None:
    """Output, gradient of the input and of every parameter: those of each clip alone."""
    module = module.double()
    x = clips_of(lengths, memory=memory).requires_grad_()
    inputs = [x, *module.parameters()]
    alone = torch.cat(each_alone(module, x, lengths), dim=2)
    together = run(x, segments_of(lengths))
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(alone)
    expected = torch.autograd.grad(alone, inputs, upstream)
    for found, wanted in zip(torch.autograd.grad(together, inputs, upstream), expected):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    with torch.no_grad():  # in which gaps are filled in place
        torch.testing.assert_close(run(x.detach(), segments_of(lengths)), alone.detach(), rtol=1e-10, atol=1e-10)


def check_nothing_leaks(run: Callable[[Tensor, Segments], Tensor], module: nn.Module, bad: float, memory: str) -> None:
    """A clip of `bad` values changes neither the others' outputs nor what flows back to them."""
    for lengths in LENGTHS:
        for spoilt in range(len(lengths)):
            x = clips_of(lengths, memory=memory)
            x.split(lengths, dim=2)[spoilt].fill_(bad)
            x.requires_grad_()
            alone = each_alone(module, x, lengths)
            together = run(x, segments_of(lengths)).split([a.shape[2] for a in alone], dim=2)
            others = [i for i in range(len(lengths)) if i != spoilt]
            if not others:
                continue
            for i in others:
                torch.testing.assert_close(together[i], alone[i], rtol=1e-10, atol=1e-10)
                assert together[i].isfinite().all()
            (expected,) = torch.autograd.grad(sum(alone[i].square().sum() for i in others), x)
            (found,) = torch.autograd.grad(sum(together[i].square().sum() for i in others), x)
            pieces = zip(found.split(lengths, dim=2), expected.split(lengths, dim=2))
            for i, (f, e) in enumerate(pieces):
                if i != spoilt:
                    torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-10)


class Conv(NamedTuple):
    method: str  # for clips of different length
    kernel: tuple[int, int, int]
    stride: tuple[int, int, int] = (1, 1, 1)
    padding: tuple[int, int, int] = (0, 0, 0)
    dilation: tuple[int, int, int] = (1, 1, 1)
    groups: int = 1
    bias: bool = True

    def module(self) -> nn.Conv3d:
        return nn.Conv3d(4, 8, self.kernel, self.stride, self.padding, self.dilation, self.groups, self.bias).double()


CONVS = [
    Conv("subsample", (1, 1, 1), (2, 1, 1)),
    Conv("subsample", (1, 3, 3), (3, 2, 2), (0, 1, 1), bias=False),
    Conv("subsample", (1, 3, 3), (2, 1, 1), (0, 2, 2), (2, 2, 2), groups=4),
    Conv("gaps", (3, 1, 1), padding=(1, 0, 0)),
    Conv("gaps", (5, 1, 1), padding=(2, 0, 0), bias=False),
    Conv("gaps", (7, 1, 1), padding=(3, 0, 0)),
    Conv("gaps", (3, 1, 1), padding=(2, 0, 0), dilation=(2, 1, 1)),
    Conv("gaps", (5, 1, 1), padding=(6, 0, 0), dilation=(3, 1, 1), bias=False),
    Conv("gaps", (3, 3, 3), padding=(1, 1, 1)),
    Conv("gaps", (3, 3, 3), (1, 2, 2), (1, 1, 1), bias=False),
    Conv("gaps", (3, 3, 3), (1, 2, 1), (1, 2, 1), (1, 2, 1)),
    Conv("gaps", (3, 3, 3), padding=(1, 1, 1), groups=4),
    Conv("gaps", (3, 1, 1), padding=(1, 0, 0), groups=2),
    Conv("gaps", (3, 1, 1), (1, 2, 2), (1, 0, 0)),
    Conv("gaps", (3, 3, 3), (2, 2, 2), (1, 1, 1)),
    Conv("gaps", (3, 1, 1), (2, 1, 1), (1, 0, 0), bias=False),
    Conv("gaps", (3, 1, 1), (3, 1, 1), (1, 0, 0), groups=4),
    Conv("gaps", (5, 1, 1), padding=(2, 0, 0), groups=4),
    Conv("gaps", (5, 3, 3), padding=(2, 1, 1)),
    Conv("gaps", (7, 1, 1), (4, 1, 1), (3, 0, 0)),
    Conv("gaps", (5, 1, 1), (8, 1, 1), (2, 0, 0), bias=False),
    Conv("gaps", (3, 3, 3), padding=(2, 1, 1), dilation=(2, 1, 1)),
    Conv("gaps", (3, 1, 1), (2, 1, 1), (2, 0, 0), (2, 1, 1)),
    Conv("gaps", (3, 3, 3), padding=(2, 1, 1)),  # longer than its input
    Conv("gaps", (5, 1, 1), padding=(3, 0, 0)),
    Conv("gaps", (1, 1, 1), padding=(1, 0, 0)),
    Conv("gaps", (2, 1, 1), (2, 1, 1), (1, 0, 0)),
    Conv("gaps", (4, 1, 1), (3, 1, 1), (2, 0, 0)),
    # An even kernel may keep the length, too: its middle lies between two features.
    Conv("gaps", (2, 1, 1), padding=(1, 0, 0), dilation=(2, 1, 1)),
    Conv("gaps", (4, 1, 1), padding=(3, 0, 0), dilation=(2, 1, 1)),
]
# Without padding there are clips too short for it.
UNPADDED = [Conv("gaps", (2, 1, 1), (2, 1, 1)), Conv("gaps", (3, 2, 2)), Conv("gaps", (3, 1, 1), (2, 1, 1)), Conv("gaps", (2, 3, 3), dilation=(2, 1, 1))]


def identify(conv: Conv) -> str:
    sizes = " ".join("".join(map(str, size)) for size in conv[1:5])
    return f"{conv.method} {sizes} {conv.groups}"


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("conv", CONVS, ids=identify)
def test_a_convolution_is_that_of_each_clip(conv, memory):
    module = conv.module()
    for lengths in LENGTHS:
        uneven = len(set(lengths)) > 1
        assert ops.method_of(module, lengths) == (conv.method if uneven or conv.method == "subsample" else "batch")
        check(lambda x, segments: ops.conv3d(module, x, segments), module, lengths, memory)


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("conv", UNPADDED, ids=identify)
def test_a_convolution_without_padding_is_that_of_each_clip(conv, memory):
    module = conv.module()
    for lengths in [(4, 3, 6, 5), (3, 3), (7,), (3, 8, 3)]:
        check(lambda x, segments: ops.conv3d(module, x, segments), module, lengths, memory)
    with pytest.raises(ValueError, match="too short for"):
        segments_of((4, 1)).after(ops.window_of(module))


@pytest.mark.parametrize("window", [Window(3, padding=1), Window(5, padding=2), Window(3, 2, 1), Window(7, 4, 3), Window(3, padding=2, dilation=2), Window(2, 2)], ids=str)
def test_rows_hold_every_clip_once_with_its_gap_and_take_no_more_than_one_row_of_all(window):
    draw = random.Random(0)
    for _ in range(200):
        lengths = tuple(draw.randint(window.kernel - 2 * window.padding, 16) for _ in range(draw.randint(1, 12)))
        long, rows = rows_of(lengths, window)
        assert sorted(clip for clips in rows for clip, _ in clips) == list(range(len(lengths)))
        for clips in rows:
            for (clip, start), (_, following) in zip(clips, clips[1:]):
                assert following - (start + lengths[clip]) >= window.padding
                assert following // window.stride >= start // window.stride + window.out(lengths[clip])
            assert all(start % window.stride == 0 for _, start in clips)
            last, start = clips[-1]
            assert start + lengths[last] <= long
        one = 0  # the end of one row of all, longest first
        for length in sorted(lengths, reverse=True):
            begin = -(-one // window.stride) * window.stride
            one, end = begin + max(length + window.padding, (window.out(length) - 1) * window.stride + 1), begin + length
        assert len(rows) * long <= end
        assert len(lengths) == 1 or len(rows_of(lengths, window, True)[1]) > 1


def with_gaps(x: Tensor, segments: Segments) -> tuple[Tensor, Segments]:
    """The same clips in rows with gaps of one place, which hold NaN."""
    parted = replace(segments, gap=1)
    spaced = x.index_select(2, parted.layout.source).index_fill(2, parted.layout.gaps, torch.nan)
    return spaced.contiguous(memory_format=torch.channels_last_3d), parted


@pytest.mark.parametrize("lengths", [(4, 1, 6, 2), (1, 7, 1, 1, 3), (6, 5, 1)])
def test_operations_that_share_gaps_give_what_each_clip_gives_alone_whatever_the_gaps_hold(lengths):
    conv, se = nn.Conv3d(4, 4, 3, padding=1, groups=4).double(), SqueezeExcitation(4, 2, is_3d=True).double()
    over_time = nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0), groups=4).double()
    x = clips_of(lengths)
    with torch.no_grad():
        alone = [se(over_time(conv(piece))) for piece in x.split(lengths, dim=2)]
        y, parted = with_gaps(x, segments_of(lengths))
        for run, module in ((ops.conv3d, conv), (ops.conv3d, over_time), (ops.squeeze_excitation, se)):
            y = run(module, y, parted)
        torch.testing.assert_close(y.index_select(2, parted.layout.kept), torch.cat(alone, dim=2), rtol=1e-10, atol=1e-10)
        means = ops.mean(y, parted, keepdim=False)
        torch.testing.assert_close(means, torch.cat([piece.mean(dim=(2, 3, 4)) for piece in alone]), rtol=1e-10, atol=1e-10)


def test_the_backward_pass_does_not_keep_the_copy_with_gaps():
    conv, lengths = nn.Conv3d(4, 4, 3, padding=1, bias=False), (4, 1, 6, 2)
    x = clips_of(lengths, dtype=torch.float32).requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        out = ops.conv3d(conv, x, segments_of(lengths))
    assert max(kept, default=0) <= conv.weight.numel(), "something as large as the features is kept"
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        out.sum().backward()


POOLS = [
    nn.MaxPool3d((2, 1, 1), (2, 1, 1), (1, 0, 0)),
    nn.MaxPool3d(3, 2, 1),
    nn.MaxPool3d((3, 3, 3), (1, 1, 1), (1, 1, 1)),
    nn.MaxPool3d((3, 1, 1), (1, 1, 1), (1, 0, 0)),
    nn.MaxPool3d((3, 1, 1), (2, 1, 1), (1, 0, 0), dilation=(2, 1, 1)),
    nn.MaxPool3d((1, 1, 1), (2, 2, 2)),
    nn.AvgPool3d((3, 1, 1), (1, 1, 1), (1, 0, 0)),
    nn.AvgPool3d((3, 3, 3), 2, (1, 1, 1)),
    nn.AvgPool3d((2, 2, 2), (2, 1, 1), (1, 0, 0)),
    nn.AvgPool3d((3, 1, 1), (2, 1, 1), (1, 0, 0), divisor_override=2),
]
UNPADDED_POOLS = [
    nn.MaxPool3d((2, 1, 1)), nn.MaxPool3d((2, 2, 2), (1, 2, 2)), nn.MaxPool3d((3, 1, 1), (2, 1, 1)),
    nn.AvgPool3d((2, 1, 1), 1), nn.AvgPool3d((2, 2, 2)), nn.AvgPool3d((3, 1, 1), (2, 1, 1), count_include_pad=False),
]  # fmt: skip


def packed_pool(module: nn.Module) -> Callable[[Tensor, Segments], Tensor]:
    run = ops.max_pool if isinstance(module, nn.MaxPool3d) else ops.avg_pool
    return lambda x, segments: run(module, x, segments)


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_a_pool_is_that_of_each_clip(pool, memory):
    for lengths in LENGTHS:
        if ops.window_of(pool).out(min(lengths)) > 0:
            check(packed_pool(pool), pool, lengths, memory)


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("pool", UNPADDED_POOLS, ids=str)
def test_a_pool_without_padding_is_that_of_each_clip(pool, memory):
    for lengths in [(4, 3, 6, 5), (3, 3), (7,), (3, 8, 3)]:
        check(packed_pool(pool), pool, lengths, memory)


def test_a_max_pool_pads_with_nothing_even_where_all_is_negative():
    pool = nn.MaxPool3d((3, 1, 1), 1, (1, 0, 0))
    lengths = (2, 1, 3)
    x = -1 - torch.rand(1, 2, 6, 3, 3)
    expected = torch.cat(each_alone(pool, x, lengths), dim=2)
    assert ops.max_pool(pool, x, segments_of(lengths)).equal(expected) and expected.max() < -1


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_squeeze_excitation_is_that_of_each_clip(lengths, memory):
    module = SqueezeExcitation(4, 2, is_3d=True)
    check(lambda x, segments: ops.squeeze_excitation(module, x, segments), module, lengths, memory)


def non_local(instantiation: str, pool: tuple[int, int, int] | None, norm: bool = True) -> nn.Module:
    module = create_nonlocal(dim_in=4, dim_inner=2, pool_size=pool, instantiation=instantiation, norm=nn.BatchNorm3d if norm else None).eval()
    if norm:
        nn.init.uniform_(module.norm.weight, 0.5, 1.5)  # it begins at zero
        module.norm.running_mean.normal_()
    return module.double()


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("pool", [None, (1, 2, 2)], ids=["all", "pooled"])
@pytest.mark.parametrize("instantiation", ["softmax", "dot_product"])
def test_a_non_local_block_is_that_of_each_clip(instantiation, pool, norm, memory):
    module = non_local(instantiation, pool, norm)
    for lengths in LENGTHS:
        check(lambda x, segments: ops.non_local(module, x, segments), module, lengths, memory)


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_a_segment_mean_is_that_of_each_clip(lengths, memory):
    x = clips_of(lengths, memory=memory).requires_grad_()
    segments = segments_of(lengths)
    alone = torch.cat(each_alone(nn.AdaptiveAvgPool3d(1), x, lengths))
    for found, expected in (
        (ops.segment_mean(x, segments), alone),
        (ops.global_pool(nn.AdaptiveAvgPool3d(1), x, segments), alone),
        (ops.mean(x, segments, keepdim=True), alone),
        (ops.mean(x, segments, keepdim=False), alone.flatten(1)),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        upstream = torch.randn_like(expected)
        found, expected = (torch.autograd.grad(out, x, upstream, retain_graph=True)[0] for out in (found, expected))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    # Given back to each feature of its clip.
    repeated = torch.cat([mean.expand(-1, length, 1, 1) for mean, length in zip(alone, lengths)], dim=1)[None]
    torch.testing.assert_close(ops.repeat_per_feature(alone, segments), repeated)


def test_a_segment_mean_of_half_precision_is_added_in_single():
    lengths = (3000, 1)
    x = torch.ones(1, 2, 3001, 1, 1, dtype=torch.float16)  # 3000 is above what float16 can count by ones
    mean = ops.segment_mean(x, segments_of(lengths))
    assert mean.dtype == torch.float16 and mean.flatten().tolist() == [1.0] * 4


OPERATIONS = {
    **{f"conv {identify(conv)}": (conv.module, ops.conv3d) for conv in CONVS},
    **{f"{pool}": (lambda pool=pool: pool, ops.max_pool if isinstance(pool, nn.MaxPool3d) else ops.avg_pool) for pool in POOLS},
    "squeeze_excitation": (lambda: SqueezeExcitation(4, 2, is_3d=True).double(), ops.squeeze_excitation),
    **{
        f"non-local {kind} {pool}": (lambda kind=kind, pool=pool: non_local(kind, pool), ops.non_local)
        for kind in ("softmax", "dot_product")
        for pool in (None, (1, 2, 2))
    },
}


@pytest.mark.parametrize("bad", slow_but([torch.nan, torch.inf], math.isnan), ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_not_finite_in_a_clip_reaches_no_other(name, bad):
    build, run = OPERATIONS[name]
    module = build()
    if isinstance(module, nn.MaxPool3d) and ops.window_of(module).out(1) < 1:
        pytest.skip("clips of one feature are too short for it")
    for memory in FORMATS:
        check_nothing_leaks(lambda x, segments: run(module, x, segments), module, bad, memory)


WINDOWS = [Window(*w) for w in [(1,), (1, 2), (1, 3, 1), (3, 1, 1), (3, 2, 1), (2, 2), (2, 2, 1), (5, 4, 2), (7, 8, 3), (3, 1, 2), (3, 1, 2, 2), (3, 2, 0, 2), (4, 1, 0)]]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_segments_behind_a_window_have_its_lengths_and_the_times_of_its_centres(window):
    pool = nn.Conv1d(1, 1, window.kernel, window.stride, window.padding, window.dilation)
    lengths = (9, 5, 12, 6)
    times = torch.cat([torch.rand(length).cumsum(0) * 3 for length in lengths])
    behind = Segments(lengths, 12, times).after(window)
    assert behind.lengths == tuple(pool(torch.zeros(1, 1, length)).shape[2] for length in lengths)
    assert behind.frames == pool(torch.zeros(1, 1, 12)).shape[2]
    expected = []
    for clip, length in zip(times.split(lengths), behind.lengths):
        for i in range(length):
            first = i * window.stride - window.padding
            centre = first + window.dilation * (window.kernel - 1) // 2
            expected.append(clip[min(max(centre, 0), len(clip) - 1)].item() / window.stride)
    assert behind.times.tolist() == pytest.approx(expected)


def test_segments_know_which_clip_a_feature_belongs_to():
    segments = segments_of((3, 1, 2))
    assert segments.owner.tolist() == [0, 0, 0, 1, 2, 2]
    assert segments.padded.tolist() == [[0, 1, 2], [3, 0, 0], [4, 5, 0]]
    assert segments.counts.tolist() == [3, 1, 2]
    assert ops.unpadded((3, 1, 2), CPU).tolist() == [0, 1, 2, 3, 6, 7]
    whole = Segments.whole(2, 3, CPU)
    assert whole.lengths == (3, 3) and whole.frames == 3 and whole.times.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("run", [ops.conv3d, ops.max_pool, ops.avg_pool])
def test_lengths_that_do_not_add_up_are_refused(run):
    with pytest.raises(AssertionError, match="packed length 5 is not 6, the sum of"):
        run(nn.Conv3d(4, 4, 3), clips_of((5,)), segments_of((3, 3)))


@pytest.mark.parametrize("memory", FORMATS)
def test_moving_frames_keeps_the_memory_format(memory):
    clips = torch.randn(3, 4, 5, 2, 2).contiguous(memory_format=FORMATS[memory])
    x = ops.pack(clips)
    assert x.equal(torch.cat(list(clips), dim=1)[None])
    x = x.contiguous(memory_format=FORMATS[memory])
    places = torch.tensor([14, 0, 0, 7])
    taken = ops.take(x, places)
    assert taken.equal(x[:, :, places]) and taken.is_contiguous(memory_format=FORMATS[memory])


def test_plans_made_in_inference_mode_serve_training():
    conv = nn.Conv3d(4, 4, (3, 1, 1), (2, 1, 1), (1, 0, 0))
    lengths = (13, 1, 4)  # of no other test, since plans are cached
    x = clips_of(lengths, dtype=torch.float32)
    with torch.inference_mode():
        ops.conv3d(conv, x, segments_of(lengths))
    ops.conv3d(conv, x.requires_grad_(), segments_of(lengths)).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize(("size", "grid"), [((32, 48), 4), ((30, 48), 4), ((8, 8), 4), ((16, 16), 1)], ids=["equal cells", "unequal cells", "small cells", "whole"])
def test_frames_are_pooled_as_torch_pools_images(size, grid, memory):
    x = torch.randn(2, 3, 5, *size, dtype=torch.float64).contiguous(memory_format=FORMATS[memory])
    wanted = torch.stack([nn.functional.adaptive_avg_pool2d(clip.transpose(0, 1), grid).flatten(1) for clip in x])  # [N, T, C g g]
    torch.testing.assert_close(ops.framewise_pool(x, grid), wanted, rtol=1e-12, atol=1e-12)
    alone = torch.cat([ops.framewise_pool(x[i : i + 1], grid) for i in range(2)])
    assert torch.equal(ops.framewise_pool(x, grid), alone)
