"""Run the programs of tools/ as a user would, in this process for speed."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from atfr.engine.distributed.preemption import SIGNALS

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def signal_handlers_kept() -> Iterator[None]:
    """Put back the handlers that a program in this block replaces: what it received must not stop the next one."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@dataclass
class Outcome:
    code: int
    out: str
    err: str


def run_tool(name: str, *arguments: str) -> Outcome:
    """`python tools/NAME.py ARGUMENTS`: exit code and what it printed."""
    return run_script(f"tools/{name}.py", *arguments)


def run_script(script: str, *arguments: str) -> Outcome:
    """The same of any program of the repository."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, [str(ROOT / script), *arguments]
    deterministic = torch.are_deterministic_algorithms_enabled()
    level = logging.root.level
    code = 0
    try:
        with signal_handlers_kept(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = before
        if torch.are_deterministic_algorithms_enabled() != deterministic:
            torch.use_deterministic_algorithms(deterministic)
        logging.root.setLevel(level)  # hydra sets it, and may disable all loggers there are, for good
        for logger in logging.root.manager.loggerDict.values():
            if isinstance(logger, logging.Logger):
                logger.disabled = False
    return Outcome(code, out.getvalue(), err.getvalue())


def torchrun(processes: int, name: str, *arguments: str, **environment: str) -> Outcome:
    """A program of tools/ on several processes of this machine."""
    return torchrun_script(processes, f"tools/{name}.py", *arguments, **environment)


def torchrun_script(processes: int, script: str, *arguments: str, **environment: str) -> Outcome:
    """Any script of the repository under torchrun; `environment` is added to ours."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*command, str(ROOT / script), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def small_job(videos: Path, folder: Path, *more: str) -> list[str]:
    """Overrides for a run of a few seconds on the videos of `small_videos`."""
    is_usual = not any(option.startswith(("model=", "model/sgs=", "model.sgs.")) for option in more)
    return [
        "dataset=videolist",
        f"dataset.root={videos}",
        "dataset.train=train.csv",
        "dataset.test=test.csv",
        "model.size=tiny",
        "dataset.clip.frames=8",
        "dataset.clip.stride=2",
        "dataset.clip.crop_size=32",
        "dataset.clip.train_short_side=[32,40]",
        "dataset.clip.test_short_side=32",
        "dataset.clip.views=2",
        "trainer.batch_size=4",
        "trainer.epochs=2",
        "trainer.workers=0",
        "trainer.statistics_clips=4",
        "trainer.log_every=1",
        "trainer.tensorboard_pictures=0",  # the tests of tests/programs/monitoring look at the pictures
        "trainer.examples=0",
        f"trainer.output_dir={folder}",
        *(["model.sgs.keep_ratio=0.5"] if is_usual else []),  # a budget in GFLOPs needs their table, which takes seconds
        *more,
    ]
