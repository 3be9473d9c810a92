"""Run a file of checks of Triton kernels in a process of its own, since Triton keeps how it runs from its import on."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from run_tools import ROOT


def names_in(checks: Path) -> list[str]:
    """Read the names in CHECKS of a file, without an import of Triton."""
    listed = next(n.value for n in ast.parse(checks.read_text()).body if isinstance(n, ast.Assign) and n.targets[0].id == "CHECKS")
    return [name.id for name in listed.elts]


def printed_by(checks: Path, *arguments: str, **environment: str) -> str:
    """Return what a file of checks prints; skip the test where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **environment}
    done = subprocess.run([sys.executable, str(checks), *arguments], env=env, capture_output=True, text=True, timeout=500)
    return done.stdout + done.stderr
