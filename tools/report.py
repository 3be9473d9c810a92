"""Write a report about runs: one HTML file that needs no network and no other file.

    python tools/report.py runs/default                       # one run
    python tools/report.py runs/sweep 'runs/*x3d*'            # all runs in a folder, and those that match a pattern
    python tools/report.py runs --output report.html --csv runs.csv

A folder is a run if it has config.yaml or results.json. Runs that differ in the seed alone become one row, their mean and standard error.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from atfr.report.page import render
from atfr.report.runs import find_runs
from atfr.report.tables import main_csv
from atfr.utils.atomic_io import atomic_write
from atfr.utils.printable import one_line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="run folder, folder of runs, or pattern")
    parser.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE", help="the page (default: report.html)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table of the runs as CSV, too")
    arguments = parser.parse_args()
    try:
        runs = find_runs(arguments.runs)
        write(arguments.output, render(runs), option="--output")
        if arguments.csv is not None:
            write(arguments.csv, main_csv(runs), option="--csv")
    except (ValueError, OSError) as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        sys.exit(1)
    tested = sum(run.results is not None for run in runs)
    untested = f", {len(runs) - tested} without" if tested < len(runs) else ""
    print(f"report of {tested} run{'s' * (tested != 1)} with results{untested}: {arguments.output}")


def write(path: Path, text: str, *, option: str) -> None:
    """Write a file atomically. Bytes of file names that are not UTF-8 stay as they are."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")
    except OSError as error:
        raise OSError(f"{option}={path} could not be written ({error.strerror})") from error


if __name__ == "__main__":
    main()
