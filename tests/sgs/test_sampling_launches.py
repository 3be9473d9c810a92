"""How many operations the default sampling launches on a GPU, counted on stand-ins: fake tensors have a device and a shape and no values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Callable

import pytest
import torch
from stand_in_gpu import GPU, fake_gpu, on_gpu
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from atfr.models.backbones.x3d import x3d
from atfr.models.packed.segments import unpadded
from atfr.models.sgs import layer
from atfr.models.sgs.config import SGSConfig
from atfr.models.sgs.sampling import decide, sample

pytest.importorskip("triton")
ATFR = SGSConfig.from_preset("atfr", keep_ratio=0.5)
MOST = 15
WITHOUT_WORK = ("empty", "empty_strided", "new_empty", "empty_like", "detach", "lift_fresh", "_unsafe_view", "_reshape_alias")


class Launches(TorchDispatchMode):
    """Lists the operations that a GPU would do: neither views, nor allocations, nor those on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        view = any(value.alias_info is not None and not value.alias_info.is_write for value in function._schema.returns)
        if function.namespace != "prim" and any(x.is_cuda for x in tensors) and not view and function.overloadpacket.__name__ not in WITHOUT_WORK:
            self.names.append(function.overloadpacket.__name__)
        return result


def launched(monkeypatch, build: Callable, sgs: SGSConfig, dtype: torch.dtype) -> list[str]:
    """What the sampling of a batch of unequal clips launches, from the clips to packed features."""
    model = build(sgs)
    unpadded.cache_clear()  # the index of each feature is copied to the GPU once for each set of lengths
    fake_gpu(monkeypatch, lambda: None)
    monkeypatch.setattr(layer, "triton_runs", lambda device: device.type == "cuda")
    layers = list(model.sgs.values())
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_gpu(model)
        clips = torch.empty(4, 3, 32, 64, 64, device=GPU).contiguous(memory_format=torch.channels_last_3d)
        features = [x.to(dtype).requires_grad_() for x in model.run_stem(clips)[: len(layers)]]
        nothing = [None] * len(layers)
        with Launches() as launches:
            decision = decide(layers, [x.shape[2] for x in features], nothing, None, clips)
            packed, done = sample(layers, features, nothing, None, clips, decision)
    for x, one, kept in zip(features, done, packed):
        assert one.segments.lengths == (3, 4, 3, 4) and one.segments.times.shape == (14,)
        assert kept.shape == (1, x.shape[1], 14, *x.shape[3:]) and kept.dtype == dtype and kept.requires_grad
    return launches.names


@pytest.mark.parametrize("same_number", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_default_sampling_launches_at_most_15_operations(monkeypatch, dtype, same_number):
    names = launched(monkeypatch, lambda sgs: x3d(size="tiny", num_classes=3, sgs=sgs), replace(ATFR, same_number=same_number), dtype)
    assert names.count("cut") == 1 and names.count("bmm") == 1
    assert len(names) <= MOST, names
