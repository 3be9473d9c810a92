"""Pictures of a few telling test clips: the cheapest and the dearest that are right, and the dearest that are wrong."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from atfr.data.clips import TestClips
from atfr.engine.evaluator import View
from atfr.models.flops import GflopsTable
from atfr.models.video_net import VideoNet
from atfr.utils.atomic_io import write_text
from atfr.utils.printable import printable

log = logging.getLogger(__name__)

FOLDER = "examples"
KINDS = ("cheapest right", "dearest right", "dearest wrong")


def choose_examples(views: Sequence[View], costs: Sequence[float], each: int) -> list[tuple[str, View, float]]:
    """Choose up to `each` clips of each kind, all of different videos. Returns (kind, clip, GFLOPs).

    Of clips that cost the same, those with the highest score of the predicted class come first.
    """
    rows = [(cost, -float(view.scores.max()), bool(view.scores.argmax() == view.label), view) for view, cost in zip(views, costs)]
    chosen: list[tuple[str, View, float]] = []
    for kind in KINDS:
        sign, left = 1 if kind.startswith("cheapest") else -1, each
        for cost, _, is_right, view in sorted(rows, key=lambda row: (sign * row[0], row[1])):
            if not left:
                break
            if is_right == kind.endswith("right") and all(view.video != other.video for _, other, _ in chosen):
                chosen.append((kind, view, cost))
                left -= 1
    return chosen


def write_examples(
    model: VideoNet,
    views: Sequence[View],
    clips: TestClips,
    *,
    each: int,
    table: GflopsTable,
    normalise: nn.Module,
    class_names: Sequence[str],
    folder: Path,
    precision: torch.dtype = torch.float32,
) -> None:
    """Draw what is merged in telling clips of a test: PNGs and `examples.json`, in `examples/` of the run folder.

    Files of an earlier test are removed. A dense network gets none. A clip that cannot be read again is left out with a warning.

    Args:
        views: the results of the clips.
        clips: the clips, which are read again.
        each: number of clips of a kind; 0: none.
    """
    folder = folder / FOLDER
    (folder / "examples.json").unlink(missing_ok=True)
    for kind in KINDS:
        for left in folder.glob(f"{kind.replace(' ', '_')}_*.png"):
            left.unlink()
    if not (each and model.sgs):
        return
    from atfr.viz.clips import merge_pictures  # matplotlib takes a second to import
    from atfr.viz.merges import save

    entries: list[dict[str, object]] = []
    for kind, view, cost in choose_examples(views, [table.at(view.bins) for view in views], each):
        read = clips[view.video * clips.views * clips.crops + view.view]
        if read.clip is None:
            log.warning("%s", printable(f"no example of {read.path}: {read.error}"))
            continue
        pictures = merge_pictures(model, [read.clip], normalise=normalise, class_names=class_names, labels=[view.label], precision=precision)
        file = f"{kind.replace(' ', '_')}_{1 + sum(entry['kind'] == kind for entry in entries)}.png"
        save(pictures[0], folder / file)
        best = int(view.scores.argmax())
        found = {"label": class_names[view.label], "prediction": class_names[best], "score": float(view.scores[best])}
        cost_of_it = {"bins": "/".join(map(str, view.bins)), "gflops": cost}
        entries.append({"kind": kind, "video": view.path, "view": view.view, **found, **cost_of_it, "file": file})
    write_text(folder / "examples.json", json.dumps(entries, indent=2) + "\n")
