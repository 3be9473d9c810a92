"""Checks of the Triton kernels of packed execution under Triton's interpreter, each a test in `test_kernels.py`.

Triton reads TRITON_INTERPRET at its import, so that this runs in a process of its own:
`TRITON_INTERPRET=1 PYTHONPATH=.:tests/helpers/networks python tests/packed/kernels/kernels_interpreted.py`. It prints the name of each check that passes.
"""

from __future__ import annotations

import operator
import random
import sys
import traceback
from unittest.mock import patch

import interpreted_triton
import torch
from fvcore.nn.squeeze_excitation import SqueezeExcitation
from pytorchvideo.models.slowfast import FuseFastToSlow
from torch import Tensor, fx, nn

from atfr.models.backbones import slowfast
from atfr.models.graph.fusing import fusing, run
from atfr.models.packed import ops
from atfr.models.packed.kernels import clips, rows, support
from atfr.models.packed.segments import Segments, window_of

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LENGTHS = ((2, 1, 3), (2, 2))


def features(channels: int, frames: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(1, channels, frames, height, width, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)


def segments_of(lengths: tuple[int, ...]) -> Segments:
    return Segments(lengths, max(lengths), torch.cat([torch.arange(n, dtype=torch.float32) for n in lengths]))


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    scale = max(expected.abs().max().item(), 1.0)
    torch.testing.assert_close(found.double(), expected.double(), rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype] * scale)


def cases() -> list[tuple[tuple[int, ...], tuple[int, int, int], torch.dtype]]:
    """Lengths; channels, height and width; type."""
    draw = random.Random(0)
    sizes = [((1, 3, 5), torch.float64), ((7, 1, 1), torch.bfloat16), ((54, 7, 9), torch.float32), ((432, 2, 1), torch.float32)]
    sizes += [((54, 3, 3), torch.float16)]
    return [((1, *(draw.randint(1, 3) for _ in range(draw.randint(1, 2)))), *size) for size in sizes]


def gathered_frames_and_their_gradients() -> None:
    for lengths, size, dtype in cases():
        plan = ops.layout(lengths, ops.Window(5, padding=2), torch.device("cpu"))
        for relu in (False, True):
            for fill in (0.0, -torch.inf):
                x = features(size[0], sum(lengths), *size[1:], dtype).requires_grad_()
                wanted = (x.relu() if relu else x).index_select(2, plan.source).index_fill(2, plan.gaps, fill)
                found = rows.gather_rows(x, *plan.into, fill, relu)
                assert torch.equal(found, wanted) and found.is_contiguous(memory_format=torch.channels_last_3d) and found.dtype == dtype
                upstream = torch.randn_like(wanted)
                for f, w in zip(torch.autograd.grad(found, x, upstream), torch.autograd.grad(wanted, x, upstream)):
                    assert torch.equal(f, w)
        out = features(size[0], len(plan.out.inverse), *size[1:], dtype).requires_grad_()
        found, wanted = rows.gather_rows(out, *plan.out, 0.0, False), out.index_select(2, plan.kept)
        upstream = torch.randn_like(wanted)
        assert torch.equal(found, wanted)
        assert torch.equal(torch.autograd.grad(found, out, upstream)[0], torch.autograd.grad(wanted, out, upstream)[0])


def a_relu_on_the_way_in_keeps_nan() -> None:
    plan = ops.layout((2, 1), ops.Window(3, padding=1), torch.device("cpu"))
    x = features(2, 3, 2, 2, torch.float32)
    x[:, :, 1] = torch.nan
    found = rows.gather_rows(x, *plan.into, 0.0, True)
    torch.testing.assert_close(found, x.relu().index_select(2, plan.source).index_fill(2, plan.gaps, 0), equal_nan=True)


def clip_means_and_their_gradients() -> None:
    for lengths, size, dtype in cases():
        x, segments = features(size[0], sum(lengths), *size[1:], dtype).requires_grad_(), segments_of(lengths)
        wanted = torch.stack([clip.double().mean(dim=(0, 2, 3, 4)) for clip in x.split(lengths, dim=2)])
        found = clips.clip_means(x, segments.owner, segments.starts)
        assert found.dtype == dtype
        close(found, wanted, dtype)
        upstream = torch.randn_like(found)
        close(torch.autograd.grad(found, x, upstream)[0], torch.autograd.grad(wanted, x, upstream.double())[0], dtype)


def a_mean_of_half_precision_is_added_in_single() -> None:
    segments = segments_of((1, 2))
    x = torch.ones(1, 2, 3, 60, 50, dtype=torch.float16)  # 3000 is above what float16 can count by ones
    assert clips.clip_means(x, segments.owner, segments.starts).flatten().tolist() == [1.0] * 4


def scaled_clips_and_their_gradients() -> None:
    for lengths, size, dtype in cases():
        x, segments = features(size[0], sum(lengths), *size[1:], dtype).requires_grad_(), segments_of(lengths)
        scale = torch.randn(len(lengths), size[0], dtype=dtype, requires_grad=True)
        exact = scale.double()
        wanted = torch.cat([clip.double() * exact[i, :, None, None, None] for i, clip in enumerate(x.split(lengths, dim=2))], dim=2)
        found = clips.scale_clips(x, scale, segments.owner, segments.starts)
        assert found.dtype == dtype
        close(found, wanted, dtype)
        upstream = torch.randn_like(found)
        pairs = zip(torch.autograd.grad(found, (x, scale), upstream), torch.autograd.grad(wanted, (x, scale), upstream.double()))
        for f, w in pairs:
            assert f.dtype == dtype
            close(f, w, dtype)


def normalised_frames() -> None:
    for lengths, size, dtype in cases():
        plan = ops.layout(lengths, ops.Window(3, padding=1), torch.device("cpu"))
        channels, parameters = size[0], torch.float64 if dtype == torch.float64 else torch.float32
        norm = nn.BatchNorm3d(channels, dtype=parameters).eval()
        for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
            tensor.normal_()
        norm.running_var.uniform_(0.1, 2)
        x = features(channels, len(plan.out.inverse), *size[1:], dtype)
        residual = features(channels, sum(lengths), *size[1:], dtype)
        for affine, add, relu in ((True, True, True), (False, False, True), (True, False, False), (True, True, False)):
            weight, bias = (norm.weight, norm.bias) if affine else (None, None)
            exact = [None if p is None else p.double() for p in (norm.running_mean, norm.running_var, weight, bias)]
            wanted = nn.functional.batch_norm(x.double().index_select(2, plan.kept), *exact, eps=norm.eps)
            wanted = wanted + residual.double() if add else wanted
            wanted = wanted.relu() if relu else wanted
            found = rows.normalise_frames(x, plan.out.slots, norm.running_mean, norm.running_var, weight, bias, residual if add else None, norm.eps, relu)
            assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last_3d)
            close(found, wanted, dtype)
        everything = rows.normalise_frames(x, None, norm.running_mean, norm.running_var, norm.weight, norm.bias, None, norm.eps, False)
        close(everything, nn.functional.batch_norm(x.double(), norm.running_mean.double(), norm.running_var.double(), norm.weight.double(), norm.bias.double()), dtype)


def a_residual_sum_with_its_relu() -> None:
    for lengths, size, dtype in cases():
        x, y = (features(size[0], sum(lengths), *size[1:], dtype).requires_grad_() for _ in range(2))
        found, wanted = rows.add_relu(x, y), (x + y).relu()
        upstream = torch.randn_like(found)
        close(found, wanted, dtype)
        for f, w in zip(torch.autograd.grad(found, (x, y), upstream), torch.autograd.grad(wanted, (x, y), upstream)):
            assert torch.equal(f, w)


def operations_are_those_of_each_clip() -> None:
    """Convolutions, pools and squeeze-excitation as GPUs run them, gradients with them."""
    modules = [
        (nn.Conv3d(7, 5, 3, padding=1), ops.conv3d),
        (nn.Conv3d(7, 5, (3, 1, 1), (2, 1, 1), (1, 0, 0), bias=False), ops.conv3d),
        (nn.Conv3d(7, 5, (5, 1, 1), padding=(2, 0, 0)), ops.conv3d),
        (nn.Conv3d(7, 5, 1, (2, 2, 2)), ops.conv3d),
        (nn.MaxPool3d((3, 1, 1), (2, 1, 1), (1, 0, 0)), ops.max_pool),
        (SqueezeExcitation(7, 3, is_3d=True), ops.squeeze_excitation),
    ]
    for module, operation in modules:
        module = module.double()
        for lengths in LENGTHS:
            x = features(7, sum(lengths), 3, 4, torch.float64).requires_grad_()
            wanted = torch.cat([module(clip.contiguous()) for clip in x.split(lengths, dim=2)], dim=2)
            found = operation(module, x, segments_of(lengths))
            close(found, wanted, torch.float64)
            upstream, inputs = torch.randn_like(wanted), (x, *module.parameters())
            for f, w in zip(torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(wanted, inputs, upstream)):
                close(f, w, torch.float64)


def what_is_not_finite_in_a_clip_reaches_no_other() -> None:
    se, conv, lengths = SqueezeExcitation(7, 3, is_3d=True), nn.Conv3d(7, 5, 3, padding=1), (4, 1, 3)
    norm = nn.BatchNorm3d(5).eval()
    for bad in (torch.nan, torch.inf):
        x = features(7, 8, 3, 3, torch.float32)
        x[:, :, 4] = bad
        x.requires_grad_()
        for operation in (
            lambda x: ops.squeeze_excitation(se, x, segments_of(lengths)),
            lambda x: ops.conv3d(conv, x, segments_of(lengths)),
            lambda x: run(norm, x, conv=conv, segments=segments_of(lengths), before=nn.ReLU(), after=nn.ReLU()),
        ):
            others = [piece for i, piece in enumerate(operation(x).split(lengths, dim=2)) if i != 1]
            assert all(piece.isfinite().all() for piece in others)
            (gradient,) = torch.autograd.grad(sum(piece.square().sum() for piece in others), x)
            assert all(piece.isfinite().all() for i, piece in enumerate(gradient.split(lengths, dim=2)) if i != 1)
            with torch.no_grad():
                assert all(piece.isfinite().all() for i, piece in enumerate(operation(x).split(lengths, dim=2)) if i != 1)


def windows_round_the_nearest_features_in_time() -> None:
    fusion = slowfast.Fusion(FuseFastToSlow(nn.Conv3d(2, 4, (5, 1, 1), (4, 1, 1), (2, 0, 0)), nn.Identity(), nn.Identity()))
    draw = random.Random(0)
    for few, many in (((1, 3, 2), (4, 1, 40)), ((2,), (33,)), ((1, 1), (1, 2))):
        slow, fast = (Segments(lengths, 64, torch.cat([torch.tensor(sorted(draw.choices(range(top), k=n))) for n in lengths]).float()) for lengths, top in ((few, 8), (many, 32)))
        x = features(2, sum(many), 1, 1, torch.float32)
        found = fusion._packed_windows(slow, fast, x)
        assert torch.equal(found, fusion._windows(slow.times, slow.owner, fast.times, fast.owner, sum(many)))
        close(fusion._convolved(x, found, as_batch=True), fusion._convolved(x, found), torch.float32)


class Block(nn.Module):
    """A residual block as torchvision writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.space, self.norm1 = nn.Conv3d(6, 9, (1, 3, 3), padding=(0, 1, 1), bias=False), nn.BatchNorm3d(9)
        self.relu = nn.ReLU(inplace=True)
        self.time, self.norm2 = nn.Conv3d(9, 6, (3, 1, 1), padding=(1, 0, 0), bias=False), nn.BatchNorm3d(6)
        self.last = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.time(self.relu(self.norm1(self.space(x)))))
        out += x
        return self.last(out)


def program_of(block: Block) -> fx.GraphModule:
    """Write the packed program of a block: (x, segments) -> its output."""
    graph = fx.Graph()
    x, segments = graph.placeholder("x"), graph.placeholder("segments")
    space = graph.call_module("space", (x,))
    relu = graph.call_module("relu", (graph.call_module("norm1", (space,)),))
    time = graph.call_function(ops.conv3d, (graph.get_attr("time"), relu, segments))
    graph.output(graph.call_module("last", (graph.call_function(operator.iadd, (graph.call_module("norm2", (time,)), x)),)))
    return fx.GraphModule(block, graph)


def joined_operations_are_those_one_by_one() -> None:
    block = Block().double()
    for norm in (block.norm1, block.norm2):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    joined = fusing(program_of(block))
    assert [node.target for node in joined.graph.nodes if node.op == "call_function"] == [run]
    for training in (True, False):
        block.train(training)
        for lengths in LENGTHS:
            x = features(6, sum(lengths), 3, 3, torch.float64).requires_grad_()
            with patch.object(support, "triton_runs", lambda device: False):
                wanted = program_of(block)(x.clone(memory_format=torch.channels_last_3d), segments_of(lengths))
            found = joined(x, segments_of(lengths))
            close(found, wanted, torch.float64)
            inputs = (x, *block.parameters())
            upstream = torch.randn_like(found)
            for f, w in zip(torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(wanted, inputs, upstream)):
                close(f, w, torch.float64)
            if not training:
                with torch.inference_mode():
                    close(joined(x.detach(), segments_of(lengths)), wanted.detach(), torch.float64)
                calls = []
                handle = block.last.register_forward_hook(lambda *_: calls.append(1))
                with torch.inference_mode():
                    close(joined(x.detach(), segments_of(lengths)), wanted.detach(), torch.float64)
                handle.remove()
                assert calls == [1]


def a_relu_in_place_stays_where_others_read_what_it_wrote() -> None:
    block = Block().eval()
    program = program_of(block)
    norm1, add = (next(n for n in program.graph.nodes if n.target in targets) for targets in (["norm1"], [operator.iadd]))
    add.args = (add.args[0], norm1)
    block.time.out_channels, block.time.weight, block.norm2 = 9, nn.Parameter(torch.randn(9, 9, 3, 1, 1)), nn.BatchNorm3d(9).eval()
    program = fx.GraphModule(block, program.graph)
    x, segments = features(6, sum(LENGTHS[0]), 3, 3, torch.float32), segments_of(LENGTHS[0])
    with torch.no_grad():
        close(fusing(program)(x, segments), program(x, segments), torch.float32)


def the_backward_pass_keeps_no_copy_with_gaps() -> None:
    conv, lengths = nn.Conv3d(4, 4, 3, padding=1, bias=False), (4, 1, 6, 2)
    x = features(4, sum(lengths), 4, 4, torch.float32).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.with_gaps(conv, x, segments_of(lengths), window_of(conv), relu=True)
    large = [t for t in kept if t.numel() > conv.weight.numel()]
    assert all(t.data_ptr() == x.data_ptr() for t in large)


CHECKS = [
    gathered_frames_and_their_gradients,
    a_relu_on_the_way_in_keeps_nan,
    clip_means_and_their_gradients,
    a_mean_of_half_precision_is_added_in_single,
    scaled_clips_and_their_gradients,
    normalised_frames,
    a_residual_sum_with_its_relu,
    operations_are_those_of_each_clip,
    what_is_not_finite_in_a_clip_reaches_no_other,
    windows_round_the_nearest_features_in_time,
    joined_operations_are_those_one_by_one,
    a_relu_in_place_stays_where_others_read_what_it_wrote,
    the_backward_pass_keeps_no_copy_with_gaps,
]

if __name__ == "__main__":
    torch.set_num_threads(1)
    interpreted_triton.mend()
    with patch.object(support, "triton_runs", lambda device: True):
        for check in CHECKS:
            torch.manual_seed(0)
            try:
                check()
                print(check.__name__, "passed", flush=True)
            except Exception:
                traceback.print_exc(file=sys.stdout)
