"""The Triton kernels through Triton's compiler, for GPUs that need not be there: what the interpreter takes may not compile."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from run_tools import ROOT

CHECKS = Path(__file__).with_name("kernels_for_gpus.py")


def names() -> list[str]:
    """The checks, read without an import of triton."""
    listed = next(n.value for n in ast.parse(CHECKS.read_text()).body if isinstance(n, ast.Assign) and n.targets[0].id == "CHECKS")
    return [name.id for name in listed.elts]


def printed_by(cache: Path, *arguments: str) -> str:
    """What the checks print: in a process of its own, since they put another driver into Triton."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, str(CHECKS), *arguments], env=env, capture_output=True, text=True, timeout=500)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def for_an_h100(tmp_path_factory: pytest.TempPathFactory) -> str:
    return printed_by(tmp_path_factory.mktemp("triton"), "90")


@pytest.mark.parametrize("name", names())
def test_kernels_compile_for_an_h100(for_an_h100: str, name: str) -> None:
    assert f"{name} passed" in for_an_h100, for_an_h100


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["75", "80", "86", "89", "90", "100", "120"])
def test_kernels_compile_with_all_blocks_for_each_generation_of_gpus(tmp_path: Path, capability: str) -> None:
    output = printed_by(tmp_path, capability, "--every")
    assert all(f"{name} passed" in output for name in names()), output
