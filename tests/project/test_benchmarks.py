"""The benchmarks that make tables for the documents run, and their figures are those of the network."""

from __future__ import annotations

import json
import sys

import pytest
from run_tools import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import backbones  # noqa: E402
import gpu  # noqa: E402


@pytest.mark.slow
def test_a_row_of_the_table_of_backbones_has_the_published_cost_of_x3d_xs():
    row = backbones.measured("x3d", "XS", batch=2, rounds=1)
    assert (row.clip, row.least) == ("4 x 160²", "1")
    assert row.params == pytest.approx(3.79, abs=0.005) and row.dense == pytest.approx(0.61, abs=0.01)
    assert 0.3 * row.dense < row.half < 0.7 * row.dense
    assert row.error < 1e-4


def test_the_gpu_is_idle_where_no_kernel_or_copy_runs(tmp_path):
    spans = [("kernel", 0, 4), ("kernel", 2, 3), ("gpu_memcpy", 8, 1), ("cpu_op", 5, 3), ("kernel", 9, 1)]  # busy 0 to 5 and 8 to 10
    trace = {"traceEvents": [{"cat": kind, "ts": begin, "dur": length} for kind, begin, length in spans]}
    (tmp_path / "trace.json").write_text(json.dumps(trace))
    assert gpu.idle_share(tmp_path / "trace.json") == pytest.approx(0.3)


def test_the_gpu_report_goes_on_past_a_failure_and_leaves_out_what_would_start_too_late(tmp_path, capsys):
    report = gpu.Report(tmp_path / "results/gpu.txt", minutes=1)
    report.guarded("first", lambda: 1 / 0)
    report.guarded("second", lambda: report.row("second: 3 ms", ms=3))
    report.end = 0
    report.guarded("third", lambda: report.line("never"))
    lines = (tmp_path / "results/gpu.txt").read_text().splitlines()
    assert lines == ["first: FAILED, ZeroDivisionError: division by zero", "second: 3 ms", "third: not run, the time is over"]
    assert json.loads((tmp_path / "results/gpu.json").read_text()) == [{"ms": 3}]
