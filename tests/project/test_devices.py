"""Tests run on the CPU wherever they run, but for those with the marker `gpu`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from devices import GIVEN, seeing
from run_tools import ROOT

# Imported by every Python process of the inner run. As CUDA does, it reads the variable at the first question, for good.
EIGHT_GPUS = """
import os, torch

shown = []

def count():
    if not shown:
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        shown.append(8 if given is None else sum(part.isdigit() and int(part) < 8 for part in given.split(",")))
    return shown[0]

torch._C._cuda_getDeviceCount = count
torch.cuda._device_count_nvml = lambda: -1
"""


@pytest.mark.slow
@pytest.mark.parametrize("given,workers", [(None, 1), ("6,3", 0)])
def test_tests_and_all_that_they_start_see_no_gpu_but_those_with_the_marker_do(tmp_path, given, workers):
    """In one run of pytest, alone and in a worker of pytest-xdist."""
    (tmp_path / "sitecustomize.py").write_text(EIGHT_GPUS)
    environment = {name: value for name, value in os.environ.items() if name not in (GIVEN, "CUDA_VISIBLE_DEVICES") and not name.startswith("PYTEST_XDIST")}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, (str(tmp_path), str(ROOT / "tests/helpers"), os.environ.get("PYTHONPATH"))))}
    if given is not None:
        environment["CUDA_VISIBLE_DEVICES"] = given
    command = [sys.executable, "-m", "pytest", "-n", str(workers), "-p", "no:cacheprovider", "-rs", "-v", "tests/project/what_tests_see.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "4 passed, 1 skipped" in done.stdout, done.stdout + done.stderr
    assert "needs 9 GPU(s), and torch sees" in done.stdout


def test_a_process_sees_the_first_of_the_gpus_that_pytest_was_given(monkeypatch):
    for given, expected in (("all", "0,1"), ("3", "3"), ("5,2,7", "5,2"), ("GPU-a,GPU-b,GPU-c", "GPU-a,GPU-b"), ("", ""), ("-1", "-1")):
        monkeypatch.setenv(GIVEN, given)
        assert seeing(2) == {"CUDA_VISIBLE_DEVICES": expected}
