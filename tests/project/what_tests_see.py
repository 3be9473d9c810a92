"""Run by test_devices.py with pytest, on a machine that seems to have eight GPUs: which of them a test and its processes see."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from devices import number_of_gpus, seeing
from forked import ended, start
from run_tools import torchrun_script

from atfr.cli import launch
from atfr.engine.distributed import comm

COUNT = "import sys, torch; sys.exit(torch.cuda.device_count())"


def require(expected: int) -> None:
    assert torch.cuda.device_count() == expected and torch.cuda.is_available() == (expected > 0)


def test_a_test_sees_none():
    require(0)
    assert launch.processes_to_start("auto", None) == 1 and not comm.uses_gpu("auto")


def test_nor_does_a_process_that_it_forks_or_starts():
    assert ended(start(require, 0)) == 0
    assert subprocess.run([sys.executable, "-c", COUNT]).returncode == 0
    outcome = torchrun_script(1, "tests/project/what_tests_see.py")
    assert outcome.code == 0, outcome.err


@pytest.mark.gpu
def test_a_test_with_the_marker_sees_none_itself_and_gives_its_processes_one():
    require(0)
    assert ended(start(require, 1, **seeing())) == 0
    outcome = torchrun_script(1, "tests/project/what_tests_see.py", "1", **seeing())
    assert outcome.code == 0, outcome.err


@pytest.mark.gpu(2)
def test_or_two():
    assert number_of_gpus(2) == 2
    assert ended(start(require, 2, **seeing(2))) == 0


@pytest.mark.gpu(9)
def test_nine_are_not_there():
    raise AssertionError("it is not skipped")


if __name__ == "__main__":
    require(int(sys.argv[1]) if sys.argv[1:] else 0)
