"""Accuracy, and the results of an evaluation as `results.json`, `predictions.csv` and a table."""

from __future__ import annotations

import csv
import io
import json
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import torch

from atfr.engine.evaluator import Evaluation, View
from atfr.models.flops import CONVENTION, GflopsTable
from atfr.utils.atomic_io import write_text


def accuracy(views: Sequence[View]) -> dict[str, float]:
    """Compute top1, top5 and mean_class_accuracy in percent, with each video's scores averaged over its views.

    mean_class_accuracy is the mean of the per-class top-1 over the classes that have videos. With fewer than five classes, top5
    is 100.

    Raises:
        ValueError: there are no views.
    """
    if not views:
        raise ValueError("no video of the split could be read, so there is no accuracy")
    by_video: dict[int, list[View]] = {}
    for view in views:
        by_video.setdefault(view.video, []).append(view)
    scores = torch.from_numpy(np.stack([np.mean([v.scores for v in group], axis=0) for group in by_video.values()]))
    labels = torch.tensor([group[0].label for group in by_video.values()])
    ranked = scores.argsort(dim=1, descending=True, stable=True)
    hits = ranked == labels[:, None]
    per_class = [hits[labels == label, 0].float().mean() for label in labels.unique()]
    return {
        "top1": 100 * hits[:, 0].float().mean().item(),
        "top5": 100 * hits[:, :5].any(dim=1).float().mean().item(),
        "mean_class_accuracy": 100 * torch.stack(per_class).mean().item(),
    }


def summarise(evaluation: Evaluation, table: GflopsTable, *, protocol: dict[str, Any]) -> dict[str, Any]:
    """Compute the contents of `results.json`.

    `gflops.mean`, `min` and `max` are the costs of each clip. `clips_per_second` is measured, with the time of the network only. `bins` describes the first SGS
    layer; with several layers, `bins.layers` has all of them. `protocol.decoders` counts the videos that each decoder read.

    Raises:
        ValueError: no video of the split could be read.
    """
    views = evaluation.views
    if not views:
        first = next(iter(evaluation.failed.values()), None)
        said = f"{first.path}: {first.reason}" if first else "none listed: the split is empty"
        raise ValueError(f"none of the {len(evaluation.failed)} videos could be read, so there is no accuracy (first: {said})")
    costs = [table.at(view.bins) for view in views]
    per_layer = [_bins(kept, frames) for kept, frames in zip(zip(*(view.bins for view in views)), evaluation.frames)]
    decoders = Counter(decoder for video, decoder in evaluation.decoders.items() if video not in evaluation.failed)
    bins = per_layer[0] if len(per_layer) == 1 else {**per_layer[0], "layers": per_layer}
    return {
        **accuracy(views),
        "num_videos": len({view.video for view in views}),
        "num_views": len(views),
        "failed": [failed.path for failed in evaluation.failed.values()],
        "gflops": {
            "dense": table.dense,
            "mean": sum(costs) / len(costs),
            "min": min(costs),
            "max": max(costs),
            "convention": CONVENTION,
        },
        "bins": bins,
        "clips_per_second": evaluation.clips_per_second,
        "protocol": {**protocol, "failed": len(evaluation.failed), "decoders": decoders, "commit": _commit()},
    }


def _bins(kept: Sequence[int], frames: int) -> dict[str, Any]:
    histogram = {str(b): n for b, n in sorted(Counter(kept).items())}
    return {"mean": sum(kept) / len(kept), "min": min(kept), "max": max(kept), "frames": frames, "histogram": histogram}


def write_results(results: dict[str, Any], folder: Path) -> Path:
    """Write `results.json` atomically."""
    path = folder / "results.json"
    write_text(path, json.dumps(results, indent=2) + "\n")
    return path


def write_predictions(evaluation: Evaluation, table: GflopsTable, folder: Path, *, class_names: Sequence[str]) -> Path:
    """Write `predictions.csv`: one row per clip (view), sorted by video and view."""
    path = folder / "predictions.csv"
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["video", "view", "label", "prediction", "score", "bins", "gflops"])
    for view in evaluation.views:
        best = int(view.scores.argmax())
        names = class_names[view.label], class_names[best]
        writer.writerow([view.path, view.view, *names, f"{view.scores[best]:.4f}", "/".join(map(str, view.bins)), f"{table.at(view.bins):.6g}"])
    # File names that are not UTF-8 are written as the bytes that they are.
    write_text(path, text.getvalue(), errors="surrogateescape")
    return path


def as_table(results: dict[str, Any], *, folder: Path) -> str:
    """Format the results for printing, in two columns."""
    gflops, bins = results["gflops"], results["bins"]
    failed = f" ({len(results['failed'])} more could not be read)" if results["failed"] else ""
    share = gflops["mean"] / gflops["dense"]
    rows = [
        ("top-1", f"{results['top1']:.2f} %"),
        ("top-5", f"{results['top5']:.2f} %"),
        ("mean class accuracy", f"{results['mean_class_accuracy']:.2f} %"),
        ("videos / views", f"{results['num_videos']}{failed} / {results['num_views']}"),
        ("dense GFLOPs per clip", f"{gflops['dense']:.4g}"),
        ("adaptive GFLOPs per clip", f"mean {gflops['mean']:.4g} ({share:.0%} of dense), min {gflops['min']:.4g}, max {gflops['max']:.4g}"),
        ("B' per clip", "; ".join(f"mean {b['mean']:.2f}, min {b['min']}, max {b['max']} of {b['frames']}" for b in bins.get("layers", [bins]))),
        ("clips/s (network alone)", f"{results['clips_per_second']:.1f}"),
        ("run folder", str(folder)),
        ("TensorBoard", f"tensorboard --logdir {folder / 'tensorboard'}"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _commit() -> str | None:
    """Return the commit of this code, with a + if it has changes; None outside a git repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
