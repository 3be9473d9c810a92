"""`trainer.deterministic` and `trainer.tf32`: what is set, and that training uses no operation that has no deterministic algorithm on a GPU."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator

import pytest
import torch
from backbone_cases import CASES, NETWORKS
from forked import Job
from omegaconf import OmegaConf
from run_tools import run_tool, small_job
from tiers import slow_but
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from atfr.cli import launch
from atfr.engine.determinism import choose_algorithms, explaining_what_is_not_deterministic
from atfr.engine.distributed.preemption import StopFlag
from atfr.engine.run import checkpoint
from atfr.models.packed import deterministic_pools
from atfr.models.packed.deterministic_pools import pool3d
from atfr.models.sgs import sampling
from atfr.models.sgs.config import SGSConfig

# From the documentation of torch.use_deterministic_algorithms (2.11), but for what no network has a use for.
REFUSED = (
    "avg_pool3d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward", "max_pool3d_with_indices_backward",
    "adaptive_max_pool2d_backward", "fractional_max_pool3d_backward", "max_unpool2d", "max_unpool3d", "upsample_linear1d_backward",
    "upsample_bilinear2d_backward", "upsample_bicubic2d_backward", "upsample_trilinear3d_backward", "reflection_pad1d_backward",
    "reflection_pad2d_backward", "reflection_pad3d_backward", "nll_loss2d_forward", "put_", "histc", "bincount", "median", "nanmedian",
    "grid_sampler_2d_backward", "grid_sampler_3d_backward", "scatter_reduce",
)  # fmt: skip
ATFR = SGSConfig.from_preset("atfr", after="res2", keep_ratio=0.5)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Refusing(TorchDispatchMode):
    """Raises at an operation that a GPU refuses to run with deterministic algorithms."""

    def __torch_dispatch__(self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = function.overloadpacket.__name__
        if name in REFUSED:
            raise RuntimeError(f"{name}_cuda does not have a deterministic implementation, but ...")
        return function(*args, **(kwargs or {}))


LAYERS = {"dense": None, "reference": SGSConfig.from_preset("reference"), "atfr": ATFR, "glance": SGSConfig.from_preset("glance", keep_ratio=0.5)}


def is_quick(case: tuple[str, str]) -> bool:
    name, sgs = case
    return name == "x3d tiny" or (sgs == "atfr" and name in ("slowfast 8x8-R50", "r2plus1d 18"))


@pytest.mark.parametrize("name, sgs", slow_but([(name, sgs) for name in NETWORKS for sgs in LAYERS if sgs != "glance" or name == "x3d tiny"], is_quick))
def test_training_uses_no_operation_without_a_deterministic_algorithm(name, sgs, deterministic, monkeypatch):
    """On the meta device, which takes the ways of a GPU and computes nothing."""

    def lengths(layers, decision, fixed):
        return [tuple(p.weights.shape[1] - i for i in range(len(p.lengths))) for p in decision.proposals]

    monkeypatch.setattr(sampling, "_on_host", lengths)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which the meta device has not
    case = CASES[name]
    with torch.device("meta"):
        model = case.build(size=case.size, num_classes=5, sgs=LAYERS[sgs])
        clips = torch.zeros(2, 3, max(case.frames, 16), 64, 64)
        with Refusing():
            logits, done = model(clips, return_sampling=True)
            loss, targets = nn.CrossEntropyLoss(label_smoothing=0.1), torch.zeros(2, dtype=torch.int64)
            (loss(logits, targets) + (done.glance_loss(loss, targets) if sgs == "glance" else 0)).backward()


def test_what_a_gpu_refuses_is_noticed_and_named():
    with torch.device("meta"):
        x = torch.zeros(1, 2, 4, 4, 4, requires_grad=True)
        message = "no deterministic algorithm for avg_pool3d_backward_cuda on this device; set trainer.deterministic=false"
        with Refusing(), pytest.raises(ValueError, match=message):
            with explaining_what_is_not_deterministic():
                nn.functional.avg_pool3d(x, 2).sum().backward()
    with pytest.raises(RuntimeError, match="something else"), explaining_what_is_not_deterministic():
        raise RuntimeError("something else")


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool3d(2),
        nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
        nn.MaxPool3d((3, 1, 1), stride=(2, 1, 1), padding=(1, 0, 0)),
        nn.MaxPool3d(3, stride=1, padding=1, dilation=(1, 2, 1)),
        nn.MaxPool3d((2, 3, 2), ceil_mode=True),
        nn.AvgPool3d((2, 1, 1), stride=1),
        nn.AvgPool3d(3, stride=2, padding=1),
        nn.AvgPool3d(3, stride=2, padding=1, count_include_pad=False, ceil_mode=True),
        nn.AvgPool3d(2, divisor_override=3),
        nn.AdaptiveAvgPool3d((None, 1, 1)),
        nn.AdaptiveAvgPool3d((2, 3, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("channels_last", [True, False])
def test_outputs_and_gradients_of_the_pools_are_those_of_torch(monkeypatch, pool, channels_last):
    """Also where values are equal: the gradient goes to the same one of them."""
    x = torch.randint(0, 4, (2, 3, 7, 9, 8)).float()
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    results = []
    for ours in (False, True):
        monkeypatch.setattr(deterministic_pools, "needs_deterministic_pool", lambda x: ours)
        given = x.clone().requires_grad_()
        out = pool3d(pool, given)
        (out * torch.arange(out.numel()).view_as(out)).sum().backward()
        results.append((out, given.grad))
    torch.testing.assert_close(results[1], results[0])


def flags() -> tuple[bool, bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.filterwarnings("error")
def test_each_job_sets_tf32_and_determinism_whatever_the_one_before_it_set(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for deterministic, tf32 in ((True, True), (False, False), (True, False), (False, True), (False, False)):
        choose_algorithms(deterministic=deterministic, tf32=tf32)
        assert flags() == (deterministic, tf32, tf32)
        with torch.backends.cudnn.flags(enabled=True):  # raises an error where torch's two interfaces disagree
            assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_a_setting_of_cublas_that_is_not_deterministic_is_refused(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    choose_algorithms(deterministic=False, tf32=False)
    with pytest.raises(ValueError, match="trainer.deterministic=true needs CUBLAS_WORKSPACE_CONFIG=:4096:8 or :16:8 in the environment, not ':0:0'"):
        choose_algorithms(deterministic=True, tf32=False)


@pytest.mark.slow
def test_tf32_belongs_to_the_experiment_and_the_results_say_whether_it_was_used(small_videos, tmp_path):
    """A CPU has none."""
    job = small_job(small_videos, tmp_path, "trainer.max_steps=1", "trainer.deterministic=true")
    outcome = run_tool("train", *job, "trainer.tf32=true")
    assert outcome.code == 0, outcome.err
    assert json.loads((tmp_path / "results.json").read_text())["protocol"]["tf32"] is False
    outcome = run_tool("train", *job)
    assert outcome.code == 1 and "holds another experiment: trainer.tf32 is True there and False here" in outcome.err, outcome.err
    assert flags()[0] is False  # of the test, not of the program


def test_testing_and_calibrating_set_what_the_checkpoint_was_trained_with(monkeypatch):
    seen = []
    monkeypatch.setattr(launch, "choose_algorithms", lambda **options: seen.append(options))
    settings = SimpleNamespace(accelerator="cpu", devices=None, deterministic=True, tf32=True)
    launch.on_every_process(lambda dist_info: seen.append(dist_info.device.type), OmegaConf.create(), settings, program="", folder=Path(), stop=StopFlag(), where="in a test")
    assert seen == [{"deterministic": True, "tf32": True}, "cpu"]


@pytest.mark.slow
def test_three_processes_that_go_on_end_with_the_very_weights_of_those_that_were_not_stopped(small_videos, tmp_path):
    """An all-reduce of three adds up in an order that depends on how DDP arranges its buckets, which the first step of a run decides."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more = ("trainer.batch_size=6", "trainer.epochs=6", "trainer.keep=20", "trainer.test=false", "trainer.deterministic=true")

    def train(folder: Path) -> dict[str, Any]:
        assert set(Job("train", *small_job(small_videos, folder, *more), processes=3, output=tmp_path / "said").wait()) == {0}, (tmp_path / "said").read_text()
        return checkpoint.load(folder / "checkpoints/last.pt")

    expected = train(whole)
    third = next(path for path in whole.glob("checkpoints/last-*.pt") if checkpoint.load(path)["step"] == 3)
    (broken / "checkpoints").mkdir(parents=True)
    shutil.copy(third, broken / "checkpoints/last.pt")
    found = train(broken)
    assert found["step"] == expected["step"] == 6
    for part in ("model", "optimizer"):
        torch.testing.assert_close(found[part], expected[part], rtol=0, atol=0, equal_nan=True)
