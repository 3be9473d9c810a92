"""How often a training step makes the host wait for the device, on a GPU of stand-ins: fake tensors have a device and a shape and no values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
import torch
from test_train import SETTINGS, Batch, trainer_of
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from atfr.data.transforms import Normalizer
from atfr.engine.distributed.comm import DistInfo
from atfr.models.backbones.slowfast import slowfast
from atfr.models.backbones.x3d import x3d
from atfr.models.packed import segments
from atfr.models.sgs import sampling
from atfr.models.sgs.config import SGSConfig
from atfr.models.sgs.sampling import HostCopy
from atfr.models.video_net import VideoNet

GPU = torch.device("cuda:0")
ATFR = SGSConfig.from_preset("atfr", after="res2", keep_ratio=0.5)


class Waits(TorchDispatchMode):
    """Raises at a copy between host and device that waits; reading a value raises of itself, since a stand-in has none.

    Lists what was done, in this order: "fetch" for a copy to the host, "conv" for a convolution. A test adds its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.done: list[str] = []

    def __torch_dispatch__(self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and args[0].device != result.device:
            if not kwargs.get("non_blocking"):
                raise AssertionError(f"a copy that waits, from {args[0].device} to {result.device}")
            if result.device.type == "cpu":
                self.done.append("fetch")
        if function is torch.ops.aten.convolution.default:
            self.done.append("conv")
        return result


class StandInEvent:
    """A CUDA event on a machine without one."""

    def record(self, stream: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


def fake_gpu(monkeypatch, waited: Callable[[], None]) -> None:
    """Let the sampling and its plans run on stand-ins: `waited` is called where the host waits for B', which is then 3, 4, 3, ..."""

    class Copy(HostCopy):
        def wait(self) -> list[list[int]]:
            assert isinstance(self._event, StandInEvent)
            waited()
            return [[3 + i % 2 for i in range(len(copy))] for copy in self._copies]

    monkeypatch.setattr(sampling, "HostCopy", Copy)
    monkeypatch.setattr(torch.cuda, "Event", StandInEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(segments, "_on", lambda values, device, dtype=torch.int64: torch.empty(np.shape(values), dtype=dtype).to(device, non_blocking=True))


def on_gpu(module: nn.Module) -> None:
    """Stand-ins on a GPU in place of all parameters and buffers."""
    for each in module.modules():
        for name, p in each._parameters.items():
            if p is not None:
                each._parameters[name] = nn.Parameter(torch.empty_like(p, device=GPU), requires_grad=p.requires_grad)
        for name, b in each._buffers.items():
            each._buffers[name] = torch.empty_like(b, device=GPU)


def step_on_gpu(monkeypatch, folder: Path, model: VideoNet, *, steps: int = 1, **settings: object) -> list[str]:
    """Take training steps; what `Waits` lists of the last one, and "wait" where the host waited for B'."""

    def backward(loss: Tensor, *_: Any, **__: Any) -> None:  # autograd needs a thread for the GPU, which is not there
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None

    monkeypatch.setattr(Tensor, "backward", backward)
    with FakeTensorMode(allow_non_fake_inputs=True):
        normalise = Normalizer([0.4] * 3, [0.2] * 3)
        on_gpu(model)
        on_gpu(normalise)
        more = {"batches": lambda epoch, start: [], "steps_per_epoch": 9, "dist_info": DistInfo(0, 1, GPU)}
        trainer = trainer_of(model, folder, normalise=normalise, settings=replace(SETTINGS, log_every=10, clip_norm=1.0, ema=0.9, **settings), **more)
        model.train()
        batch = Batch(torch.zeros(4, 3, 32, 64, 64, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), ("a",) * 4)
        assert isinstance(batch.clips, FakeTensor)
        for _ in range(steps):
            with Waits() as waits:
                fake_gpu(monkeypatch, lambda: waits.done.append("wait"))
                trainer.train_step(batch, epoch=0, data_s=0.0)
    return waits.done


def network(sgs: SGSConfig | None) -> VideoNet:
    return x3d(size="tiny", num_classes=3, sgs=sgs)


def test_a_dense_step_never_waits_for_the_device(monkeypatch, tmp_path):
    assert not {"wait", "fetch"} & set(step_on_gpu(monkeypatch, tmp_path, network(None)))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(SGSConfig.from_preset("reference"), id="reference", marks=pytest.mark.slow),
        pytest.param(ATFR, id="atfr"),
        pytest.param(replace(ATFR, embed_from="clip"), id="looks at the clip", marks=pytest.mark.slow),
        pytest.param(replace(ATFR, gflops_range=(0.3, 0.7)), id="drawn", marks=pytest.mark.slow),
        pytest.param(replace(SGSConfig.from_preset("glance"), gflops=None, keep_ratio=0.5), id="glance", marks=pytest.mark.slow),
        pytest.param(SGSConfig.from_preset("random", num_bins=8), id="random", marks=pytest.mark.slow),
    ],
)
def test_a_step_with_sampling_waits_once_for_the_lengths(monkeypatch, tmp_path, options):
    assert step_on_gpu(monkeypatch, tmp_path, network(options)).count("wait") == 1
    assert step_on_gpu(monkeypatch, tmp_path, network(options), accumulate=2).count("wait") == 2  # once for each part


@pytest.mark.slow
def test_both_pathways_of_a_slowfast_are_one_level(monkeypatch, tmp_path):
    model = slowfast(size="8x8-R50", num_classes=3, sgs=replace(ATFR, after="res2"))
    assert step_on_gpu(monkeypatch, tmp_path, model).count("wait") == 1


@pytest.mark.parametrize("embed_from, steps", [("clip", 2), ("features", 1)])
def test_a_gpu_works_on_the_stem_while_lengths_that_follow_from_the_clip_are_fetched(monkeypatch, tmp_path, embed_from, steps):
    """From the second batch on; features are there only behind the stem."""
    model = network(replace(ATFR, embed_from=embed_from))
    done = step_on_gpu(monkeypatch, tmp_path, model, steps=steps)
    with FakeTensorMode(allow_non_fake_inputs=True), Waits() as stem:
        model.run_stem(torch.zeros(4, 3, 32, 64, 64, device=GPU))
    fetched, waited = done.index("fetch"), done.index("wait")
    assert done.count("fetch") == done.count("wait") == 1
    assert done[:fetched].count("conv") == (0 if embed_from == "clip" else stem.done.count("conv"))
    assert done[:waited].count("conv") == stem.done.count("conv") > 0 and done[waited:].count("conv") > 0


def test_what_waits_is_noticed(monkeypatch, tmp_path):
    model = network(None)
    model.register_forward_pre_hook(lambda module, inputs: torch.tensor([1.0]).to(GPU))
    with pytest.raises(AssertionError, match="a copy that waits"):
        step_on_gpu(monkeypatch, tmp_path, model)
    model = network(None)
    model.register_forward_hook(lambda module, inputs, output: output[0].sum().item())
    with pytest.raises(Exception, match="_local_scalar_dense|data-dependent"):
        step_on_gpu(monkeypatch, tmp_path, model)
