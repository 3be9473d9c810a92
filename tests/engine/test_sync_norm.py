"""Batch norm over the clips of all processes."""

from __future__ import annotations

from typing import Any, Callable

import pytest
import sync_norm_processes
import torch
import torch.distributed as dist
from forked import ended, start_together
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from atfr.engine.distributed import sync_batchnorm


@pytest.mark.parametrize("steps, thorough", [(5, False), pytest.param(20, True, marks=pytest.mark.slow)])
def test_batch_norm_statistics_and_steps_of_two_processes_are_those_of_one_with_all_clips(tmp_path, steps, thorough):
    said = tmp_path / "said.txt"
    processes = start_together(sync_norm_processes.main, tmp_path, steps, thorough, processes=2, output=said)
    assert [ended(process) for process in processes] == [0, 0], said.read_text()


def test_a_group_of_one_process_normalises_as_torch_does(tmp_path):
    model = nn.Sequential(nn.BatchNorm3d(2))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with sync_batchnorm.sync_batchnorm(model), pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            model(torch.randn(1, 2, 1, 1, 1))
    finally:
        dist.destroy_process_group()
    assert all(buffer.isfinite().all() for buffer in model.buffers())


class AsOnCuda(TorchDispatchMode):
    """Refuses what the CUDA kernel of a batch norm's backward pass refuses: no saved mean and inverse deviation."""

    def __torch_dispatch__(self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.ops.aten.native_batch_norm_backward.default:
            assert all(isinstance(saved, torch.Tensor) for saved in args[5:7]), "save_mean should always be defined"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", [nn.BatchNorm3d(5), nn.BatchNorm3d(5, affine=False)], ids=["affine", "plain"])
def test_one_process_under_a_launcher_trains_as_without_also_by_the_rules_of_cuda(monkeypatch, norm):
    monkeypatch.setattr(sync_batchnorm.comm, "is_joined", lambda: True)
    x = torch.randn(4, 5, 3, 2, 2).contiguous(memory_format=torch.channels_last_3d)
    factor, gradients = torch.randn(x.shape), []
    for together in (False, True):
        given = x.clone().requires_grad_()
        with AsOnCuda():
            if together:
                with sync_batchnorm.sync_batchnorm(norm):
                    out = norm(given)
            else:
                out = norm(given)
            (out * factor).sum().backward()
        gradients.append((out, given.grad))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)
