"""The Triton kernels through Triton's compiler, for GPUs that need not be there: what the interpreter takes may not compile."""

from __future__ import annotations

from pathlib import Path

import pytest
from checks_of_kernels import names_in, printed_by

CHECKS = Path(__file__).with_name("kernels_for_gpus.py")


@pytest.fixture(scope="module")
def for_an_h100(tmp_path_factory: pytest.TempPathFactory) -> str:
    return printed_by(CHECKS, "90", TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))


@pytest.mark.parametrize("name", names_in(CHECKS))
def test_kernels_compile_for_an_h100(for_an_h100: str, name: str) -> None:
    assert f"{name} passed" in for_an_h100, for_an_h100


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["75", "80", "86", "89", "90", "100", "120"])
def test_kernels_compile_with_all_blocks_for_each_generation_of_gpus(tmp_path: Path, capability: str) -> None:
    output = printed_by(CHECKS, capability, "--every", TRITON_CACHE_DIR=str(tmp_path))
    assert all(f"{name} passed" in output for name in names_in(CHECKS)), output
