"""Several processes: launcher variables, shares of a batch, and agreement between ranks."""

from __future__ import annotations

import pytest
import torch
from run_tools import torchrun_script

from atfr.engine import distributed
from atfr.engine.distributed import Ranks


def test_a_nan_of_one_process_stops_both_or_is_left_out_by_both(tmp_path):
    outcome = torchrun_script(2, "tests/two_processes.py", str(tmp_path))
    assert outcome.code == 0, outcome.err


def test_a_part_of_the_launchers_variables_is_refused_naming_the_others(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="sets RANK, WORLD_SIZE but not MASTER_ADDR, MASTER_PORT"):
        distributed.start(accelerator="cpu", devices=None)


def test_a_global_batch_must_divide_evenly():
    ranks = Ranks(0, 3, torch.device("cpu"))
    assert ranks.share(12) == 4
    with pytest.raises(ValueError, match="trainer.batch_size=8 .* multiple of the 3 process"):
        ranks.share(8)


def test_one_process_needs_no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    ranks = distributed.start(accelerator="cpu", devices=None)
    assert (ranks.rank, ranks.world, ranks.is_main) == (0, 1, True)
    assert distributed.gathered([1, 2]) == [1, 2]
    distributed.barrier()
