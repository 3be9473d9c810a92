"""The mean over the official splits of UCF101 or HMDB51, from the run folders of trainings that differ in nothing else.

    python tools/train.py -m dataset=ucf101 dataset.split=1,2,3
    python scripts/mean_over_splits.py runs/sweep/dataset.split-*

Prints each run and the mean with the standard deviation over runs (of a sample, divisor n - 1).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from atfr.engine.run.run_dir import FREE, flat

# What follows from the split, or says where and by which copy of the code a run was made.
_OF_THE_RUN = ("official_split", "lists", "videos", "missing", "failed", "decoders", "checkpoint", "commit")
_CONFIG = ("dataset.split", *(FREE - {"trainer.max_steps"}))
_COLUMNS = ("top-1 (%)", "mean class accuracy (%)", "GFLOPs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder with a results.json")
    try:
        print(table([read(folder) for folder in parser.parse_args().runs]))
    except (ValueError, OSError) as error:
        sys.exit(f"mean_over_splits: {error}")


def read(folder: Path) -> dict[str, Any]:
    """A run's results, with its `folder` and, where there is one, its flattened `config`."""
    if not (folder / "results.json").is_file():
        raise ValueError(f"{folder} is no run folder with a results.json, which a training leaves when it has ended")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    if "official_split" not in results["protocol"]:
        raise ValueError(f"{folder} is of dataset {results['protocol']['dataset']}, which has no official splits")
    path = folder / "config.yaml"
    config = flat(yaml.safe_load(path.read_text(encoding="utf-8"))) if path.exists() else {}
    return {**results, "folder": folder, "config": config}


def table(runs: list[dict[str, Any]]) -> str:
    """One line a run, by split, and the mean; ValueError unless the runs differ in the split alone."""
    if len(runs) < 2:
        raise ValueError("a mean takes at least two runs, one a split")
    runs = sorted(runs, key=lambda run: run["protocol"]["official_split"])
    for run in runs[1:]:
        _check_alike(runs[0], run)
    splits = [run["protocol"]["official_split"] for run in runs]
    twice = next((split for split in splits if splits.count(split) > 1), None)
    if twice is not None:
        both = " and ".join(str(run["folder"]) for run in runs if run["protocol"]["official_split"] == twice)
        raise ValueError(f"{both} are both of split {twice}")
    values = [(run["top1"], run["mean_class_accuracy"], run["gflops"]["mean"]) for run in runs]
    rows = [[str(split), *(f"{value:.4g}" for value in row)] for split, row in zip(splits, values)]
    rows.append([f"mean of {len(runs)}", *(f"{mean(column):.4g} ± {stdev(column):.2g}" for column in zip(*values))])
    rows.insert(0, ["split", *_COLUMNS])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


def _check_alike(first: dict[str, Any], other: dict[str, Any]) -> None:
    compared = (("protocol", _OF_THE_RUN, flat(first["protocol"]), flat(other["protocol"])), ("config", _CONFIG, first["config"], other["config"]))
    for what, free, one, two in compared:
        for key in sorted(one.keys() | two.keys()):
            if one.get(key) != two.get(key) and key not in free and key.split(".")[0] not in free:
                values = f"{key} is {one.get(key)!r} and {two.get(key)!r} in the {what}"
                raise ValueError(f"{first['folder']} and {other['folder']} differ in more than the split: {values}")


if __name__ == "__main__":
    main()
