"""How often a training step makes the host wait for the device, on a GPU of stand-ins: fake tensors have a device and a shape and no values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from host_waits import ATFR, Waits, network, step_on_gpu
from stand_in_gpu import GPU
from torch._subclasses import FakeTensorMode

from atfr.models.backbones.slowfast import slowfast
from atfr.models.sgs.config import SGSConfig


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
