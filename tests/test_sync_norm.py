"""Batch norm over the clips of all processes."""

from __future__ import annotations

from run_tools import torchrun_script


def test_batch_norm_statistics_and_twenty_steps_of_two_processes_are_those_of_one_with_all_clips(tmp_path):
    outcome = torchrun_script(2, "tests/sync_norm_processes.py", str(tmp_path))
    assert outcome.code == 0, outcome.err
