"""The finished run that the tests of this folder test, or start from."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_tools import Outcome, run_tool, small_job


@pytest.fixture(scope="session")
def trained(small_videos, tmp_path_factory) -> tuple[Path, Outcome]:
    """The run folder of a finished small job."""
    folder = tmp_path_factory.mktemp("run")
    outcome = run_tool("train", *small_job(small_videos, folder, "model.sgs.gflops=0.6"))
    assert outcome.code == 0, outcome.err
    return folder, outcome
