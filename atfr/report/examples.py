"""The example clips of a run: `examples/examples.json` and the pictures beside it."""

from __future__ import annotations

import base64
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

LARGEST = 100_000  # bytes of a picture that is inlined as it is
WIDEST = 1200  # pixels


@dataclass(frozen=True)
class Example:
    """A test clip, and the picture of what was merged as a data URI."""

    kind: str  # "cheapest right", "dearest right", "dearest wrong"
    video: str
    label: str
    prediction: str
    score: float
    bins: str
    gflops: float
    picture: str


def read_examples(folder: Path) -> tuple[list[Example], str]:
    """Return the examples of a run folder whose pictures can be read, and a note on those that cannot."""
    path = folder / "examples" / "examples.json"
    if not path.exists():
        return [], ""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(entries, list):
            raise ValueError("it is no list")
    except (OSError, ValueError) as error:
        return [], f"examples/{path.name} is damaged: {' '.join(str(error).split())}"
    found = [example for entry in entries if (example := _example(entry, path.parent)) is not None]
    lost = len(entries) - len(found)
    return found, f"{lost} of {len(entries)} pictures of examples/ are missing or damaged" if lost else ""


def _example(entry: Any, folder: Path) -> Example | None:
    try:
        name = str(entry["file"])
        score, gflops = float(entry["score"]), float(entry["gflops"])
        if Path(name).name != name or not (math.isfinite(score) and math.isfinite(gflops)):
            return None
        bins = entry["bins"]
        kept = "/".join(map(str, bins)) if isinstance(bins, list) else str(bins)
        kind, video, label, prediction = (str(entry[key]) for key in ("kind", "video", "label", "prediction"))
        return Example(kind, video, label, prediction, score, kept, gflops, _as_uri(folder / name))
    except (OSError, ValueError, TypeError, KeyError, SyntaxError, Image.DecompressionBombError):
        return None


def _as_uri(path: Path) -> str:
    """Return a PNG as a data URI, with fewer pixels and colours if it is large."""
    content = path.read_bytes()
    with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
        picture.load()
        if len(content) > LARGEST:
            smaller = picture.convert("RGB")
            smaller.thumbnail((WIDEST, WIDEST * 4))
            buffer = io.BytesIO()
            smaller.quantize(64).save(buffer, format="PNG", optimize=True)
            content = buffer.getvalue()
    return "data:image/png;base64," + base64.b64encode(content).decode()
