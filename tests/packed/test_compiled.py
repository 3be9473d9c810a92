"""Compiled pieces: what they give is what the network gives, and nothing is compiled anew for other lengths."""

from __future__ import annotations

import copy
import random
import shutil
from dataclasses import replace

import pytest
import torch
import torch._dynamo
from compared_steps import ATFR, NETWORKS, clips, step
from torch import fx, nn
from torch._dynamo.backends.registry import lookup_backend
from training import SETTINGS, batch, train

from atfr.models.graph.compile import Compiled
from atfr.models.sgs.config import SGSConfig
from atfr.models.video_net import VideoNet


class Counting:
    """A backend of torch.compile that counts what it is given, and lets `inner` do the work."""

    def __init__(self, inner: str) -> None:
        self.inner, self.graphs = lookup_backend(inner), 0

    def __call__(self, graph: fx.GraphModule, examples: list, **options: object) -> object:
        self.graphs += 1
        return self.inner(graph, examples, **options)


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counted(name: str, inner: str) -> tuple[VideoNet, VideoNet, Counting]:
    """A network, a copy of it that is compiled, and what counts the graphs."""
    model, backend = NETWORKS[name](), Counting(inner)
    compiled = copy.deepcopy(model)
    compiled.prepare(compiled=True, backend=backend)
    return model, compiled, backend


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x3d two levels", "r3d reference"])
def test_no_graph_is_compiled_anew_whatever_the_clips_keep(name):
    model, compiled, backend = counted(name, "eager")
    x, draw = clips(3), random.Random(0)
    least = [layer.min_bins for layer in model.sgs.values()]

    def lengths() -> list[tuple[int, ...]]:
        first = tuple(draw.randint(max(least), 16) for _ in range(3))
        return [first, *(tuple(draw.randint(low, n) for n in first) for low in least[1:])]

    def both(forced: list[tuple[int, ...]]) -> None:
        torch.manual_seed(0)
        compiled.train()
        compiled(x, forced).sum().backward()
        compiled.load_state_dict(model.state_dict())  # the running statistics that this changed
        with torch.inference_mode():
            found, expected = (m.eval()(x, forced) for m in (compiled, model.train(False)))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    for most_and_least in ([(16,) * 3] * len(least), [(max(least),) * 3] * len(least)):
        both(most_and_least)  # on one thread torch's convolutions differ below and from 16 images, and graphs with them
    graphs = backend.graphs
    assert graphs > 0
    for forced in [[(9, 5, 7)] + [(4, 3, 4)] * (len(least) - 1), *(lengths() for _ in range(6))]:
        both(forced)
    assert backend.graphs == graphs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x3d atfr", "r3d reference"])
def test_a_compiled_step_is_the_networks_step(name):
    model, compiled, _ = counted(name, "aot_eager")
    assert list(compiled.state_dict()) == list(model.state_dict())
    # In float64, in which a ReLU does not flip by a rounding.
    torch.testing.assert_close(step(compiled.double(), clips().double()), step(model.double(), clips().double()), rtol=1e-9, atol=1e-10)


@pytest.mark.slow
def test_a_dense_network_is_one_graph_for_training_and_one_for_evaluation_for_any_number_of_clips():
    _, compiled, backend = counted("x3d", "eager")
    for n in (4, 2, 5, 3):
        compiled.train()(clips(n)).sum().backward()
        with torch.inference_mode():
            compiled.eval()(clips(n))
    assert backend.graphs == 2


def test_statistics_and_copies_run_as_they_did():
    _, compiled, backend = counted("x3d atfr", "eager")
    assert any(isinstance(m, Compiled) for program in compiled._training_programs for m in program.modules())
    with torch.no_grad():
        compiled.train()(clips())
    copy.deepcopy(compiled).eval()(clips())
    assert backend.graphs == 0


def test_without_a_compiler_the_error_is_one_line(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"trainer.compile=true needs a C\+\+ compiler, and there is no .* on this machine"):
        NETWORKS["x3d"]().prepare(compiled=True)


def small(sgs: SGSConfig) -> VideoNet:
    """What the compiler is through with in a few seconds, and without dropout, of which it draws its own."""
    layers = (nn.Conv3d(3, 8, 3, padding=1, bias=False), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU())
    return VideoNet(nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 3)), stages={}, sgs=sgs)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler here")
def test_a_compiled_training_goes_as_one_that_is_not_and_their_checkpoints_are_of_one_kind(tmp_path):
    batches = [batch(seed) for seed in range(3)]
    models = [small(replace(ATFR, width=None, keep_ratio=0.5, after="2")) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    settings = replace(SETTINGS, clip_norm=1.0, ema=0.9)
    plain = train(tmp_path / "plain", batches, settings, models[0])
    train(tmp_path / "compiled", batches, replace(settings, compile=True, max_steps=2), models[1])
    train(tmp_path / "compiled", batches, replace(settings, compile=False), models[1])  # resumes it
    torch.testing.assert_close(dict(models[1].state_dict()), dict(plain.model.state_dict()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("other", ["sync_batch_norm", "checkpoint_activations"])
def test_what_does_not_go_with_compiling_is_refused_in_one_line(other):
    with pytest.raises(ValueError, match=f"trainer.compile=true .*trainer.{other}"):
        replace(SETTINGS, compile=True, **{other: True})
