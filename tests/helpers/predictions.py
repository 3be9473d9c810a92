"""The predictions of a test, as its run folder has them."""

from __future__ import annotations

import csv
from pathlib import Path


def rows(folder: Path) -> list[dict[str, str]]:
    """Read the rows of predictions.csv in a run folder."""
    return list(csv.DictReader((folder / "predictions.csv").open()))
