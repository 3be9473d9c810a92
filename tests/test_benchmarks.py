"""The benchmarks that make tables for the documents run, and their figures are those of the network."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import backbones  # noqa: E402


def test_a_row_of_the_table_of_backbones_has_the_published_cost_of_x3d_xs():
    row = backbones.measured("x3d", "XS", batch=2, rounds=1)
    assert (row.clip, row.least) == ("4 x 160²", "1")
    assert row.params == pytest.approx(3.79, abs=0.005) and row.dense == pytest.approx(0.61, abs=0.01)
    assert 0.3 * row.dense < row.half < 0.7 * row.dense
    assert row.error < 1e-4
