"""Batch norm over the clips of all processes."""

from __future__ import annotations

import pytest
from run_tools import torchrun_script


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_batch_norm_statistics_and_twenty_steps_of_several_processes_are_those_of_one_with_all_clips(tmp_path, processes):
    outcome = torchrun_script(processes, "tests/sync_norm_processes.py", str(tmp_path))
    assert outcome.code == 0, outcome.err
