"""Several processes: launcher variables, shares of a batch, and agreement between ranks."""

from __future__ import annotations

import pytest
import torch
from run_tools import torchrun_script

from atfr.data.loader import TrainSampler
from atfr.engine import distributed
from atfr.engine.distributed import Ranks


def test_a_nan_of_one_process_stops_both_or_is_left_out_by_both_and_both_hear_of_what_differs(tmp_path):
    outcome = torchrun_script(2, "tests/two_processes.py", str(tmp_path))
    assert outcome.code == 0, outcome.err


def test_a_part_of_the_launchers_variables_is_refused_naming_the_others(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="sets RANK, WORLD_SIZE but not MASTER_ADDR, MASTER_PORT"):
        distributed.start(accelerator="cpu", devices=None)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_the_shares_of_a_global_batch_that_does_not_divide_are_the_batch_and_differ_by_one_clip(world):
    samplers = [TrainSampler(20, seed=0, global_batch=8, rank=rank, world=world) for rank in range(world)]
    (alone,) = [list(TrainSampler(20, seed=0, global_batch=8))]
    for batch, shares in zip(alone, zip(*samplers), strict=True):
        assert sorted(index for share in shares for index in share) == sorted(batch)
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1 and max(sizes) == Ranks(0, world, torch.device("cpu")).share(8)


def test_one_process_needs_no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    ranks = distributed.start(accelerator="cpu", devices=None)
    assert (ranks.rank, ranks.world, ranks.is_main) == (0, 1, True)
    assert distributed.gathered([1, 2]) == [1, 2]
    distributed.barrier()
