"""Small text files of a run folder, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_text(path: Path, text: str, *, errors: str = "strict") -> None:
    """Write a UTF-8 file so that a kill or a full disk leaves what was there; `errors` as in `open`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with open(partial, "w", newline="", encoding="utf-8", errors=errors) as file:
        file.write(text)
    os.replace(partial, path)
