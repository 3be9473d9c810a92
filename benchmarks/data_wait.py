"""How much of a training goes to waiting for data: the quickstart's job for one epoch, or a run that is there.

    python benchmarks/data_wait.py [--save] [dataset.root=DIR ...]    # further overrides of tools/train.py
    python benchmarks/data_wait.py --run RUN

The share is that of `data_s` (until a step's batch came) in `data_s + step_s`, over all steps after the first logged one,
before which the workers start. With --save it is also written to benchmarks/results/data_wait-cpu.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
SAVED = ROOT / "benchmarks" / "results" / "data_wait-cpu.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run folder; without it one epoch is trained")
    parser.add_argument("--save", action="store_true", help=f"write {SAVED.relative_to(ROOT)}")
    arguments, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="data_wait") as folder:
        run = arguments.run or train(Path(folder), overrides)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    data, step, steps = waited([line for line in lines if line["split"] == "train"])
    text = (
        f"$ python benchmarks/data_wait.py {' '.join(sys.argv[1:])}\n"
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}\n"
        f"{steps} steps: {1e3 * data / steps:.2f} ms for data and {1e3 * step / steps:.1f} ms for the rest of a step; waiting is {data / (data + step):.2%} of the time\n"
    )
    print(text, end="")
    if arguments.save:
        SAVED.write_text(text)


def train(folder: Path, overrides: list[str]) -> Path:
    """A run of tools/train.py for one epoch."""
    once = ["trainer.epochs=1", "trainer.test=false", "trainer.log_every=1", f"trainer.output_dir={folder / 'run'}"]
    done = subprocess.run([sys.executable, str(ROOT / "tools/train.py"), *once, *overrides], stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit("data_wait: the training failed")
    return folder / "run"


def waited(lines: list[dict[str, Any]]) -> tuple[float, float, int]:
    """Seconds for data, seconds for the rest, and how many steps they are of; a line has the means since the one before it."""
    if len(lines) < 2:
        sys.exit("data_wait: the run has not logged two training steps")
    data = step = 0.0
    for before, line in zip(lines, lines[1:]):
        count = line["step"] - before["step"]
        data, step = data + count * line["data_s"], step + count * line["step_s"]
    return data, step, lines[-1]["step"] - lines[0]["step"]


if __name__ == "__main__":
    main()
