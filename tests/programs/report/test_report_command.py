"""The command of the report: other programs name it, it starts without torch and Hydra, and a wheel has its template."""

from __future__ import annotations

import os
import subprocess
import sys
from configparser import ConfigParser
from fnmatch import fnmatch

import pytest
from omegaconf import OmegaConf
from report_pages import report, results_of
from run_tools import ROOT, run_tool, small_job

from atfr.cli.sweep import NamesReport


def test_an_installed_wheel_has_the_template():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    pattern = config["options.package_data"]["atfr.report"]
    files = [path.relative_to(ROOT / "atfr/report") for path in (ROOT / "atfr/report").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert files and all(fnmatch(str(path), pattern) for path in files)


@pytest.mark.parametrize("overrides,said", [([], True), (["trainer.output_dir=x"], False), (["trainer.test=false"], False), (["dry_run=true"], False)])
def test_a_sweep_names_the_report_of_its_folder(overrides, said, capsys):
    config = OmegaConf.create({"hydra": {"job": {"name": "train"}, "overrides": {"task": ["trainer.seed=0,1", *overrides]}}})
    NamesReport().on_multirun_end(config)
    assert capsys.readouterr().out == ("report: python tools/report.py runs/sweep\n" if said else "")


def test_neither_torch_nor_hydra_is_imported():
    code = "import runpy, sys; runpy.run_path('tools/report.py'); print(*({'torch', 'hydra', 'omegaconf'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


def test_a_training_names_the_report_and_the_report_shows_it(small_videos, tmp_path):
    folder = tmp_path / "a run"
    trained = run_tool("train", *small_job(small_videos, folder, "model=x3d", "trainer.max_steps=1", "dataset.clip.views=1"))
    assert trained.code == 0, trained.err
    assert trained.out.splitlines()[-1] == f"report: python tools/report.py '{folder}'"
    page, _, _ = report(folder, folder=tmp_path)
    assert page.table("runs")[0][2][1] == results_of(folder)["top1"]
    assert not any("Why it has no results" in rows[0][-1][0] for rows in page.tables)
    assert "Files that could not be read" not in page.text
    assert "size: tiny" in page.text
