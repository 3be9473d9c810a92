"""Batch norm over the clips of all processes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from run_tools import torchrun_script
from torch import nn

from atfr.engine.sync_norm import over_all_processes


def test_batch_norm_statistics_and_twenty_steps_of_two_processes_are_those_of_one_with_all_clips(tmp_path):
    outcome = torchrun_script(2, "tests/sync_norm_processes.py", str(tmp_path))
    assert outcome.code == 0, outcome.err


def test_a_group_of_one_process_normalises_as_torch_does(tmp_path):
    model = nn.Sequential(nn.BatchNorm3d(2))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with over_all_processes(model), pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            model(torch.randn(1, 2, 1, 1, 1))
    finally:
        dist.destroy_process_group()
    assert all(buffer.isfinite().all() for buffer in model.buffers())
