"""Training steps on a GPU of stand-ins, and what makes the host wait in them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Callable

import torch
from stand_in_gpu import GPU, fake_gpu, on_gpu
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from training import SETTINGS, Batch, trainer_of

from atfr.data.transforms import Normalizer
from atfr.engine.distributed.comm import DistInfo
from atfr.models.backbones.x3d import x3d
from atfr.models.sgs.config import SGSConfig
from atfr.models.video_net import VideoNet

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
