"""A GPU of stand-ins: fake tensors have a device and a shape and no values."""

from __future__ import annotations

from typing import Callable

import numpy as np
import pytest
import torch
from torch import nn

from atfr.models.packed import segments
from atfr.models.sgs import sampling
from atfr.models.sgs.sampling import HostCopy

GPU = torch.device("cuda:0")


class StandInEvent:
    """A CUDA event on a machine without one."""

    def record(self, stream: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


def fake_gpu(monkeypatch: pytest.MonkeyPatch, waited: Callable[[], None]) -> None:
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
