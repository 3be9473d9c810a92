"""Checks of the depthwise kernels, run by `test_depthwise_kernels` in a process in which Triton interprets its kernels, and by `test_gpu_networks` on a GPU."""

from __future__ import annotations

import json
import math
import random
import sys
import traceback
from pathlib import Path
from typing import Callable, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from atfr.models.packed.kernels import depthwise
from atfr.models.packed.segments import Segments
from atfr.models.sgs.config import SGSConfig
from atfr.models.video_net import VideoNet


class Case(NamedTuple):
    channels: int
    size: tuple[int, int]
    kernel: tuple[int, int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dtype: torch.dtype
    weight_dtype: torch.dtype
    bias: bool = False

    def lengths(self) -> tuple[int, ...]:
        """Of two or three clips, one of which is a single feature; few of them, since the interpreter is slow."""
        draw = random.Random(str(self))
        lengths = [1, *draw.choice([(2,), (3,), (1, 2)])] if self.kernel[1] == 1 else [1, 2]
        draw.shuffle(lengths)
        return tuple(lengths)

    def tensors(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor | None]:
        torch.manual_seed(0)
        x = torch.randn(1, self.channels, sum(self.lengths()), *self.size).contiguous(memory_format=torch.channels_last_3d)
        bias = torch.randn(self.channels).to(device, self.weight_dtype).requires_grad_() if self.bias else None
        weight = torch.randn(self.channels, 1, *self.kernel).to(device, self.weight_dtype).requires_grad_()
        return x.to(device, self.dtype).requires_grad_(), weight, bias

    def __str__(self) -> str:
        types = " ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys((self.dtype, self.weight_dtype)))
        return f"{self.channels} channels {'x'.join(map(str, self.kernel))} stride {self.stride[0]} of {self.size[0]}x{self.size[1]} {types}"


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CASES = [
    Case(1, (5, 4), (3, 1, 1), (1, 1), (0, 0), F32, F32, bias=True),
    Case(7, (3, 4), (3, 3, 3), (1, 1), (1, 1), F16, F16, bias=True),
    Case(7, (3, 3), (3, 3, 3), (2, 2), (1, 1), F32, F32),
    Case(24, (3, 5), (5, 1, 1), (1, 1), (0, 0), F32, F32),
    Case(24, (4, 3), (5, 1, 1), (2, 2), (0, 0), BF16, F32, bias=True),  # the types under autocast
    Case(54, (4, 3), (3, 3, 3), (2, 2), (1, 1), BF16, F32),
    Case(432, (1, 2), (3, 1, 1), (1, 1), (0, 0), BF16, BF16),
    Case(3, (5, 4), (1, 4, 2), (1, 3), (3, 0), F32, F32),  # of no network here
]


def bounds_of(lengths: tuple[int, ...]) -> Tensor:
    return Segments(lengths, max(lengths), torch.zeros(sum(lengths))).bounds


def results(run: Callable[[], Tensor], inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """An output, and the gradients of a sum of its products with fixed numbers of this type."""
    out = run()
    upstream = torch.linspace(-1, 2, out.numel()).view(out.shape[2:] + out.shape[:2]).permute(3, 4, 0, 1, 2).to(dtype).to(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


def check_against_float64(case: Case, device: str = "cpu") -> None:
    """Output and gradients are those of torch's convolution of each clip alone in float64, rounded."""
    x, weight, bias = case.tensors(device)
    lengths = case.lengths()
    inputs = [t for t in (x, weight, bias) if t is not None]
    found = results(lambda: torch.ops.atfr.depthwise3d(x, weight, bias, bounds_of(lengths).to(device), case.stride, case.padding)[0], inputs, case.dtype)
    exact = [t.detach().to(case.dtype).double().requires_grad_() for t in inputs]  # autocast rounds the weight, too

    def each_alone() -> Tensor:
        clips = exact[0].split(lengths, dim=2)
        options = {"stride": (1, *case.stride), "padding": (case.kernel[0] // 2, *case.padding), "groups": case.channels}
        return torch.cat([nn.functional.conv3d(clip, *exact[1:], **options) for clip in clips], dim=2)

    summed = math.sqrt(found[0].numel() / case.channels) / 4  # the error of a sum of so many, at random
    for name, mine, expected, dtype in zip(("output", "input", "weight", "bias"), found, results(each_alone, exact, case.dtype), (x.dtype, *(t.dtype for t in inputs))):
        assert mine.dtype == dtype
        precision = (4 + summed * (name in ("weight", "bias"))) * torch.finfo(dtype).eps
        torch.testing.assert_close(mine.double(), expected, rtol=precision, atol=precision * expected.abs().max().item(), msg=lambda said: f"{name}: {said}")
    assert found[0].is_contiguous(memory_format=torch.channels_last_3d) and found[1].is_contiguous(memory_format=torch.channels_last_3d)


def check_no_leak(kernel: tuple[int, int, int]) -> None:
    """A clip of NaN changes neither the outputs of others nor the gradients of their features."""
    lengths, padding = (1, 2, 1), (kernel[1] // 2, kernel[2] // 2)
    x, weight = torch.randn(1, 3, 4, 3, 3), torch.randn(3, 1, *kernel)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        out, _ = torch.ops.atfr.depthwise3d(x.requires_grad_(), weight, None, bounds_of(lengths), (1, 1), padding)
        return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]  # the gradient that comes in is NaN, too

    bad = x.clone()
    bad.split(lengths, dim=2)[1].fill_(torch.nan)
    for found, expected in zip(run(bad), run(x)):
        before, spoilt, after = found.split(lengths, dim=2)
        assert before.equal(expected[:, :, :1]) and after.equal(expected[:, :, 3:]) and spoilt.isnan().all()


def check_dense() -> None:
    """Without bounds each element of a batch is a clip, in any memory format. Autocast rounds as in torch."""
    conv = nn.Conv3d(4, 4, 3, (1, 2, 2), 1, groups=4)
    x = torch.randn(2, 4, 2, 3, 4)
    with torch.no_grad():
        for memory in (torch.contiguous_format, torch.channels_last_3d):
            out = depthwise.conv3d(conv, x.contiguous(memory_format=memory))
            torch.testing.assert_close(out, conv(x), rtol=1e-5, atol=1e-5)
            assert out.is_contiguous(memory_format=torch.channels_last_3d)
        torch.set_autocast_enabled("cuda", True)
        half = depthwise.conv3d(conv, x)
        torch.set_autocast_enabled("cuda", False)
        expected = conv.half().double()(x.half().double())
        torch.testing.assert_close(half, expected.to(torch.get_autocast_dtype("cuda")), rtol=2e-3, atol=1e-3)


def check_stand_ins() -> None:
    """Fake tensors get the shape, type and strides of the real ones."""
    x, weight = torch.randn(1, 3, 3, 3, 2, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last_3d), torch.randn(3, 1, 3, 1, 1)
    bounds, space = bounds_of((2, 1)), ((2, 2), (0, 0))
    out, taps = torch.ops.atfr.depthwise3d(x, weight, None, bounds, *space)
    calls = [
        (torch.ops.atfr.depthwise3d, (x, weight, None, bounds, *space)),
        (torch.ops.atfr.depthwise3d_input_gradient, (out, taps, bounds, 3, 2, (3, 1, 1), *space)),
        (torch.ops.atfr.depthwise3d_weight_gradient, (out, x, bounds, (3, 1, 1), *space)),
    ]
    for operation, arguments in calls:
        real = operation(*arguments)
        with FakeTensorMode() as mode:
            fake = operation(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
        for one, other in zip(real, fake) if isinstance(real, tuple) else [(real, fake)]:
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


class Net(nn.Module):
    """Depthwise convolutions behind SGS, with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.over_time = nn.Conv3d(3, 5, 1), nn.Conv3d(5, 5, (5, 1, 1), padding=(2, 0, 0), groups=5)
        self.block, self.head = nn.Conv3d(5, 5, 3, padding=1, groups=5, bias=False), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.over_time(self.stem(x)).relu()).mean((2, 3, 4)))


def check_networks() -> None:
    """Networks with and without SGS give the same logits and gradients by the kernels as by torch's convolutions."""
    batch = torch.randn(2, 3, 3, 4, 4)
    for sgs in (SGSConfig.from_preset("atfr", after="stem"), None):
        net = VideoNet(Net(), sgs=sgs, probe=(3, 4, 4))
        clips, forced = (batch, [(1, 3)]) if sgs else (batch[:, :, :1], None)

        def run() -> list[Tensor]:
            logits = net(clips, forced)
            return [logits.detach(), *torch.autograd.grad(logits.square().sum(), list(net.parameters()))]

        expected, calls = run(), []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(depthwise, "takes", lambda module, device, dtype: calls.append(module) or depthwise.is_depthwise(module))
            found = run()
        assert {net.over_time, net.block} <= set(calls)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


CHECKS: dict[str, tuple[Callable, tuple]] = {
    **{str(case): (check_against_float64, (case,)) for case in CASES},
    "no leak 3x3x3": (check_no_leak, ((3, 3, 3),)),
    "no leak 5x1x1": (check_no_leak, ((5, 1, 1),)),
    "dense": (check_dense, ()),
    "stand-ins": (check_stand_ins, ()),
    "networks": (check_networks, ()),
}


def run_all(names: list[str]) -> dict[str, str]:
    """What each of these checks failed with."""
    failures = {}
    for name in names:
        check, arguments = CHECKS[name]
        torch.manual_seed(0)
        try:
            check(*arguments)
        except Exception:
            failures[name] = traceback.format_exc()
    return failures


if __name__ == "__main__":
    import interpreted_triton

    torch.set_num_threads(1)
    interpreted_triton.mend()
    Path(sys.argv[1]).write_text(json.dumps(run_all(sys.argv[2:])))
