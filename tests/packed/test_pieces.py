"""Activations that are computed again in the backward pass: the same step as without, in less memory."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from compared_steps import ATFR, NETWORKS, clips, of_x3d, step
from tiers import slow_but
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import video
from training import SETTINGS, batch, train

from atfr.models.backbones.x3d import x3d
from atfr.models.graph.recompute import Recomputed
from atfr.models.sgs.sampling import NonFiniteFeatures
from atfr.models.video_net import VideoNet

SMALLER = {"r3d": (2, 8), "r3d reference": (2, 8), "slowfast atfr": (2, 16)}  # clips and frames


@pytest.mark.parametrize("name", slow_but(NETWORKS, lambda name: name not in ("r3d reference", "x3d two levels", "slowfast atfr")))
def test_a_step_is_the_same_in_loss_gradients_and_running_statistics(name):
    model = NETWORKS[name]()
    again = copy.deepcopy(model)
    again.prepare(compute_again=True)
    assert list(again.state_dict()) == list(model.state_dict())
    x = clips(*SMALLER.get(name, ()))
    expected, found = step(model, x), step(again, x)
    assert "atfr" not in name or len(set(expected[3])) > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(again.eval()(x), model.eval()(x), rtol=0, atol=0)


def test_dropout_draws_the_same_the_second_time_and_the_next_draw_is_another():
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Conv3d(4, 4, 3, padding=1), nn.Dropout(0.5), nn.ReLU(inplace=True)) for _ in range(3))
            self.stem, self.pool, self.head = nn.Conv3d(3, 4, 1), nn.AdaptiveAvgPool3d(1), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for layer in self.layers:
                x = x + layer(x)
            return self.head(self.pool(x).flatten(1))

    model = VideoNet(Dropping(), stages={}, sgs=None)
    again = copy.deepcopy(model)
    again.prepare(compute_again=True)
    torch.testing.assert_close(step(again, clips()), step(model, clips()), rtol=0, atol=0)
    assert not torch.equal(again(clips()), again(clips()))


def test_the_sampling_is_done_once_and_what_it_refuses_is_still_refused():
    model, calls = NETWORKS["x3d atfr"](), []
    model.prepare(compute_again=True)
    model.sgs["stem"].register_forward_hook(lambda *_: calls.append(1))
    norm = next(m for m in reversed(list(model.dense_network.modules())) if isinstance(m, nn.BatchNorm3d) and m is not model.dense_network.blocks[-1].pool.pre_norm)
    step(model, clips())
    assert len(calls) == 1 and norm.num_batches_tracked == 1
    spoilt = clips()
    spoilt[1, 0, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteFeatures):
        model(spoilt)


def test_in_evaluation_nothing_runs_in_pieces():
    model = NETWORKS["x3d"]()
    model.prepare(compute_again=True)
    assert model._running is model._training_programs
    with torch.no_grad():
        assert model._running is model._programs
    assert model.eval()._running is model._programs


@pytest.mark.parametrize("build, most", [(NETWORKS["x3d"], 0.6), (of_x3d(replace(ATFR, width=1e-3)), 0.7)], ids=["dense", "all features kept"])
def test_the_peak_of_memory_falls(build, most):
    model = build()
    again = copy.deepcopy(model)
    again.prepare(compute_again=True)
    x = clips(8)
    before, after = (peak(lambda: step(each, x)) for each in (model, again))
    assert after < most * before, after / before


def peak(run: Callable[[], object]) -> int:
    """The most bytes that tensors made in this call had at any time."""
    watch = Watch()
    with watch:
        run()
    return watch.most


class Watch(TorchDispatchMode):
    """Adds up the storages that operations make, and takes off those that are gone."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {id(s) for s in map(Tensor.untyped_storage, (a for a in args if isinstance(a, Tensor)))}
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage(), given)
        return result

    def _add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or id(storage) in given:
            return
        self.known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def test_a_block_is_cut_where_its_sum_is_made_and_what_changes_in_place_stays_with_what_it_changes():
    model = VideoNet(video.r3d_18(num_classes=5), stages={}, sgs=None)
    model.prepare(compute_again=True)
    program = model._training_programs[0]
    pieces = [m.piece for m in program.modules() if isinstance(m, Recomputed)]
    assert len(pieces) == 8  # stem and first block, six blocks, ... each with one value to hand over
    assert all(len(next(iter(reversed(piece.graph.nodes))).args[0]) == 1 for piece in pieces)


def test_a_training_with_it_ends_with_the_same_weights(tmp_path):
    batches = [batch(seed) for seed in range(3)]
    models = [x3d(size="tiny", num_classes=3, sgs=replace(ATFR, width=None, keep_ratio=0.5)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    settings = replace(SETTINGS, accumulate=2, clip_norm=1.0, ema=0.9)
    for number, (model, on) in enumerate(zip(models, (False, True))):
        train(tmp_path / str(number), batches, replace(settings, checkpoint_activations=on), model)
    torch.testing.assert_close(dict(models[1].state_dict()), dict(models[0].state_dict()), rtol=0, atol=0)
