"""The Triton kernels of packed execution against torch, clip by clip, under Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checks_of_kernels import names_in, printed_by

from atfr.models.packed.kernels import support

CHECKS = Path(__file__).with_name("kernels_interpreted.py")


@pytest.fixture(scope="module")
def output() -> str:
    """What the checks print."""
    return printed_by(CHECKS, TRITON_INTERPRET="1")


@pytest.mark.parametrize("name", names_in(CHECKS))
def test_kernels(output, name):
    assert f"{name} passed" in output, output


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs as torch describes them, of which the first is too old for Triton."""
    monkeypatch.setattr(support, "_RUNS", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old one")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0) if device.index == 0 else (7, 5))


def test_no_kernel_runs_on_cpus_and_the_reason_why_not_on_a_gpu_is_logged_once(gpus, monkeypatch, caplog):
    monkeypatch.setattr(support, "_run_first_kernel", lambda device: None)
    assert not support.triton_runs(torch.device("cpu"))
    for _ in range(2):
        assert not support.triton_runs(torch.device("cuda:0"))
    assert len(caplog.records) == 1 and "an old one has compute capability 7.0" in caplog.records[0].message
    assert support.triton_runs(torch.device("cuda:1"))


@pytest.mark.parametrize("message", ["Failed to find C compiler.\nSet CC.", ""])
def test_where_the_first_kernel_fails_no_other_one_runs_and_one_line_says_why(gpus, monkeypatch, caplog, message):
    calls = []

    def fail(device: torch.device) -> None:
        calls.append(device)
        raise RuntimeError(message)

    monkeypatch.setattr(support, "_run_first_kernel", fail)
    for _ in range(2):
        assert not support.triton_runs(torch.device("cuda:1"))
    assert len(calls) == 1
    (record,) = caplog.records
    assert f"RuntimeError: {message.partition(chr(10))[0]}" in record.message and "needs a C compiler" in record.message and "\n" not in record.message
