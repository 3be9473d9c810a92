"""The cut as one Triton kernel, against all cuts tried one by one and against the plain functions.

Triton interprets the kernel on the CPU, in a process of its own, since it reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from partition_checks import CHECKS

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    program = "import json, partition_checks; print(json.dumps(partition_checks.failures()))"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CHECKS)
def test_the_kernel_cuts_like_the_plain_functions_and_like_a_trial_of_all_cuts(name, interpreted):
    assert not interpreted[name], interpreted[name]
