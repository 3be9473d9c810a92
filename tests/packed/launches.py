"""Count the kernels that a network launches, on a GPU of stand-ins: fake tensors have a device and a shape and no values."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import ExitStack
from typing import Any, Iterator
from unittest.mock import patch

import numpy as np
import torch
from stand_in_gpu import GPU, on_gpu
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from atfr.models.packed import segments
from atfr.models.packed.kernels import support
from atfr.models.video_net import VideoNet

SAMPLING = "atfr/models/sgs/"
# Operations on memory and metadata alone.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "set_", "resize_", "device", "detach", "as_strided_"}
KERNELS = {"clip_means": 2, "clip_products": 2}  # that an operation of this package launches, if not one


class Launches(TorchDispatchMode):
    """Counts the operations that launch a kernel on the device, by name: those of the sampling apart from the others.

    A view, an allocation and an operation on the host launch none. An operation of torch counts as one kernel.
    `shapes` are those that each convolution is given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network: Counter[str] = Counter()
        self.sampling: Counter[str] = Counter()
        self.convolutions: list[tuple[tuple[int, ...], tuple[int, ...], int]] = []  # input, weight, groups

    def __torch_dispatch__(self, function: Any, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        if name == "convolution":
            self.convolutions.append((tuple(args[0].shape), tuple(args[1].shape), args[8]))
        if not function.is_view and name not in FREE and any(t.device.type == "cuda" for t in _tensors((args, kwargs, result))):
            counts = self.sampling if _is_sampling() else self.network
            counts[name] += KERNELS.get(name, 1)
        return result


def _tensors(values: Any) -> Iterator[Tensor]:
    return (t for t in torch.utils._pytree.tree_leaves(values) if isinstance(t, Tensor))


def _is_sampling() -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        if SAMPLING in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def stand_in(values: Any, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Stands for a copy of integers to the device."""
    return torch.empty(np.shape(values), dtype=dtype, device=device)


def launches(model: VideoNet, shape: tuple[int, ...], forced: list[tuple[int, ...]] | None, *, training: bool, triton: bool = True) -> Launches:
    """Count a forward pass for clips of this shape, as on a GPU with or without Triton. Afterwards the model has no values."""
    model.train(training)
    with ExitStack() as stack:
        stack.enter_context(patch.object(segments, "_on", stand_in))
        stack.enter_context(patch.object(support, "triton_runs", lambda device: triton))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        on_gpu(model)
        x = torch.empty(shape, device=GPU)
        stack.enter_context(torch.set_grad_enabled(training))
        found = stack.enter_context(Launches())
        model(x, forced)
    return found
