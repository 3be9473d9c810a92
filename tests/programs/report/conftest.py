"""The run folders of a sweep, and the page about them."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_pages import Parsed, report, write_run


@pytest.fixture(scope="session")
def sweep(tmp_path_factory) -> Path:
    """Dense, three budgets of which one has three seeds, and two baselines."""
    top = tmp_path_factory.mktemp("sweep")
    write_run(top / "dense", similarity=None, top1=80.5, gflops=0.04, speed=21.5)
    for seed, top1 in enumerate((71.5, 74.25, 76.0)):
        write_run(top / f"atfr 0.5 seed {seed}", top1=top1, gflops=0.02 + seed / 1000, seed=seed, speed=40.0 + seed)
    write_run(top / "atfr 0.7", top1=79.75, gflops=0.028, speed=30.0, sgs={"gflops": 0.7})
    write_run(top / "atfr 0.3", top1=61.0, gflops=0.013, speed=50.0, sgs={"gflops": 0.3})
    write_run(top / "uniform", top1=70.0, gflops=0.021, speed=41.0, similarity="uniform")
    write_run(top / "stride", top1=66.0, gflops=0.021, speed=43.0, similarity="stride")
    return top


@pytest.fixture(scope="session")
def shown(sweep, tmp_path_factory) -> tuple[Parsed, str, Path]:
    folder = tmp_path_factory.mktemp("report")
    page, source, _ = report(sweep, folder=folder)
    return page, source, folder
