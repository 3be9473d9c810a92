"""The Triton kernels of depthwise convolutions, by Triton's interpreter on the CPU, and what calls them on a GPU of stand-ins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Iterable

import depthwise_checks
import host_waits
import pytest
import torch
from depthwise_checks import BF16, CASES, F32
from host_waits import ATFR, network, step_on_gpu
from run_tools import ROOT
from stand_in_gpu import GPU
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from atfr.models.packed import convolution, ops, segments
from atfr.models.packed.kernels import depthwise, support

SLOW = [str(case) for case in (*CASES[2:5], *CASES[6:])]


def interpreted(folder: Path, checks: Iterable[str]) -> dict[str, str]:
    """What each check failed with, in a new process: Triton reads the variable when it is imported, which other tests may have done here."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    ended = subprocess.run([sys.executable, depthwise_checks.__file__, folder / "failures.json", *checks], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads((folder / "failures.json").read_text())


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> dict[str, str]:
    return interpreted(tmp_path_factory.mktemp("interpreter"), [name for name in depthwise_checks.CHECKS if name not in SLOW])


@pytest.fixture(scope="module")
def slow_failures(tmp_path_factory) -> dict[str, str]:
    return interpreted(tmp_path_factory.mktemp("interpreter"), SLOW)


@pytest.mark.parametrize("case", [str(case) for case in CASES if str(case) not in SLOW])
def test_output_and_gradients_are_those_of_each_clip_alone_in_float64(failures, case):
    assert case not in failures, failures[case]


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_output_and_gradients_of_more_shapes_are_those_of_each_clip_alone_in_float64(slow_failures, case):
    assert case not in slow_failures, slow_failures[case]


@pytest.mark.parametrize("kernel", ["3x3x3", "5x1x1"])
def test_a_nan_in_a_clip_reaches_no_other(failures, kernel):
    assert f"no leak {kernel}" not in failures, failures[f"no leak {kernel}"]


def test_a_dense_batch_is_convolved_as_by_torch(failures):
    assert "dense" not in failures, failures["dense"]


def test_stand_ins_have_the_shape_type_and_strides_of_the_real_results(failures):
    assert "stand-ins" not in failures, failures["stand-ins"]


def test_networks_give_the_same_logits_and_gradients_with_kernels_and_without(failures):
    assert "networks" not in failures, failures["networks"]


@pytest.fixture
def gpu(monkeypatch) -> None:
    """A GPU on which Triton runs, as far as the dispatch is concerned."""
    monkeypatch.setattr(support, "triton_runs", lambda device: device.type == "cuda")


def depthwise_conv(**options: Any) -> nn.Conv3d:
    return nn.Conv3d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 1, "groups": 4, **options})


class OwnForward(nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def test_the_kernels_take_depthwise_convolutions_of_equal_length_and_nothing_else(gpu):
    def taken(module: nn.Module, dtype: torch.dtype = F32) -> bool:
        return depthwise.takes(module, GPU, dtype)

    with FakeTensorMode(), torch.device(GPU):
        over_time = depthwise_conv(kernel_size=(5, 1, 1), padding=(2, 0, 0), stride=(1, 2, 2))
        assert taken(depthwise_conv()) and taken(over_time) and taken(depthwise_conv(dtype=BF16), BF16) and taken(depthwise_conv(padding=(1, 0, 3)))
        others = [
            depthwise_conv(groups=2), depthwise_conv(out_channels=8), depthwise_conv(stride=(2, 1, 1)), depthwise_conv(dilation=2, padding=2),
            depthwise_conv(padding=(0, 1, 1)), depthwise_conv(padding="same"), depthwise_conv(padding_mode="replicate"), depthwise_conv(kernel_size=(2, 3, 3)),
            OwnForward(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.utils.parametrizations.weight_norm(depthwise_conv()),
        ]  # fmt: skip
        assert not any(map(taken, others))
        assert not taken(depthwise_conv(), BF16) and not taken(depthwise_conv(dtype=torch.float64), torch.float64)  # torch refuses the first
        hooked = depthwise_conv()
        hooked.register_forward_hook(lambda *_: None)
        assert not taken(hooked)
    assert not depthwise.takes(depthwise_conv(), torch.device("cpu"), F32) and not taken(depthwise_conv())  # the weight is on the CPU


class Calls(host_waits.Waits):
    """Notes the memory that the kernels read and write in a step, and that which is copied or filled from one place to another."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[tuple[Tensor, Tensor]] = []  # input and output
        self.moved: list[Tensor] = []

    def __torch_dispatch__(self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = super().__torch_dispatch__(function, types, args, kwargs)
        if function is torch.ops.atfr.depthwise3d.default:
            self.kernels.append((args[0], result[0]))
        elif function.overloadpacket.__name__ in ("index_select", "index_fill", "index_fill_", "index_copy", "index_copy_", "index", "gather", "copy_", "clone", "cat"):
            self.moved += [t for t in (args[0], result) if isinstance(t, Tensor)]
        return result


@pytest.mark.parametrize("sgs", [pytest.param(None, id="dense", marks=pytest.mark.slow), pytest.param(ATFR, id="packed")])
def test_a_step_of_x3d_calls_a_kernel_for_each_depthwise_convolution_and_moves_no_frames_for_it(monkeypatch, tmp_path, gpu, sgs):
    model, calls = network(sgs), Calls()
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv3d) and module.groups > 1]
    monkeypatch.setattr(host_waits, "Waits", lambda: calls)
    step_on_gpu(monkeypatch, tmp_path, model)
    assert len(calls.kernels) == len(convolutions) > 3
    used = {t.untyped_storage()._cdata for pair in calls.kernels for t in pair}
    assert not used & {t.untyped_storage()._cdata for t in calls.moved}


def test_without_triton_one_line_says_so_and_torch_convolves(monkeypatch, caplog):
    monkeypatch.setattr(segments, "_on", lambda values, device, dtype=torch.int64: torch.empty(len(values), dtype=dtype, device=device))
    lengths = (2, 1, 3)
    with FakeTensorMode(), torch.device(GPU):
        conv, x = depthwise_conv(), torch.empty(1, 4, 6, 3, 3)
        conv(x)  # the first stand-in on a GPU sets torch up for them, which it cannot while a GPU seems to be there
        monkeypatch.setattr(support, "_RUNS", {})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        monkeypatch.setitem(sys.modules, "triton", None)  # importing it fails
        packed = segments.Segments(lengths, 3, torch.zeros(6))
        for _ in range(2):
            assert not depthwise.takes(conv, GPU, F32)
            assert convolution.conv3d(conv, x).shape == ops.conv3d(conv, x, packed).shape == x.shape
    assert [record.message.split(":")[0] for record in caplog.records] == ["networks run without Triton kernels, and slower"]
