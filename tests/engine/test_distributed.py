"""Several ranks: launcher variables, shares of a batch, and agreement between ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.testing._internal.distributed.fake_pg  # registers the backend "fake"
import two_processes
from forked import ended, start_together, torchrun_places

from atfr.data.loader import TrainSampler
from atfr.engine.distributed import comm
from atfr.engine.distributed.comm import DistInfo


def test_two_ranks_agree_on_nans_signals_and_inputs(tmp_path):
    said = tmp_path / "said.txt"
    processes = start_together(two_processes.main, tmp_path, processes=2, output=said)
    assert [ended(process) for process in processes] == [0, 0], said.read_text()


def test_incomplete_launcher_variables_are_refused_naming_the_missing_ones(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="sets RANK, WORLD_SIZE but not MASTER_ADDR, MASTER_PORT"):
        comm.start(accelerator="cpu", devices=None)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_the_shares_of_a_global_batch_add_up_to_it_and_differ_by_at_most_one_clip(world):
    samplers = [TrainSampler(20, seed=0, global_batch=8, rank=rank, world=world) for rank in range(world)]
    (alone,) = [list(TrainSampler(20, seed=0, global_batch=8))]
    for batch, shares in zip(alone, zip(*samplers), strict=True):
        assert sorted(index for share in shares for index in share) == sorted(batch)
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1 and max(sizes) == DistInfo(0, world, torch.device("cpu")).share(8)


def test_one_process_needs_no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    dist_info = comm.start(accelerator="cpu", devices=None)
    assert (dist_info.rank, dist_info.world, dist_info.is_main) == (0, 1, True)
    assert comm.gathered([1, 2]) == [1, 2]
    comm.barrier()


def test_ranks_on_gpus_exchange_numbers_and_objects_through_their_hosts(monkeypatch):
    """The collectives of the GPU are replaced by a backend that does nothing; those of the hosts are real."""
    for name, value in torchrun_places(1)[0].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-0"))
    init = comm.dist.init_process_group

    def without_nccl(backend: str, **options: Any) -> None:
        assert backend == "cpu:gloo,cuda:nccl"
        init("cpu:gloo,cuda:fake", **options)

    monkeypatch.setattr(comm.dist, "init_process_group", without_nccl)
    try:
        dist_info = comm.start(accelerator="auto", devices=None)
        assert dist_info == DistInfo(0, 1, torch.device("cuda", 0))
        assert comm.gathered([{"a": 1}]) == [{"a": 1}] and comm.largest(3) == 3
        told = comm.DelayedMax()
        assert [told.largest(number) for number in (5, 6, 7)] == [0, 5, 6]
        assert comm.summed(torch.ones(())).item() == 1  # on the host
        comm.barrier()
    finally:
        comm.stop()
