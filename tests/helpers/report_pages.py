"""Run folders written by hand, and the page that tools/report.py makes of run folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml
from run_tools import Outcome, run_tool

VOID = {"meta", "input", "img", "link", "br", "hr"}  # elements without an end


class Parsed(HTMLParser):
    """A page's elements, its text outside scripts and styles, and its tables as rows of (text, value to sort by)."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.tables: list[list[list[tuple[str, float | None]]]] = []
        self.ids: dict[str, int] = {}  # of tables
        self.bold: list[str] = []
        self._best = False
        self.feed(page)
        assert self.open == [], "elements that are not closed"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.elements.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.ids[found.get("id") or f"table {len(self.tables)}"] = len(self.tables)
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            value = found.get("data-value")
            self.tables[-1][-1].append(("", None if value is None else float(value)))
            self._best = "best" in (found.get("class") or "")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if "style" in self.open or "script" in self.open:
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            text, value = self.tables[-1][-1][-1]
            self.tables[-1][-1][-1] = (f"{text} {data.strip()}".strip(), value)
            if self._best and data.strip():
                self.bold.append(data.strip())

    def table(self, name: str) -> list[list[tuple[str, float | None]]]:
        """Return the rows of a table, without its head."""
        return self.tables[self.ids[f"{name}-table"]][1:]


def write_run(
    folder: Path,
    *,
    top1: float = 50.0,
    gflops: float = 0.02,
    speed: float = 40.0,
    seed: int = 0,
    similarity: str | None = "partition",
    name: str = "a",
    classes: Sequence[str] = ("run", "jump"),
    views: int = 2,
    **options: Any,
) -> Path:
    """Write a run folder as tools/train.py does; similarity None: a dense network."""
    folder.mkdir(parents=True)
    sgs = None if similarity is None else {"_target_": "atfr.models.sgs.config.SGSConfig", "similarity": similarity, **options.pop("sgs", {"gflops": 0.5})}
    model = {"sgs": sgs, "_target_": "atfr.models.backbones.x3d.x3d", "size": "tiny", **options.pop("model", {})}
    trainer = {"epochs": 4, "seed": seed, "output_dir": None, "workers": 2, "max_steps": None, **options.pop("trainer", {})}
    config = {"dataset": {"_target_": "atfr.data.datasets.videolist.videolist", "clip": {"frames": 16}}, "model": model, "trainer": trainer, **options}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "test_config.yaml").write_text(yaml.safe_dump(config))
    results = {
        "top1": top1, "top5": 90.0 + top1 / 1000, "mean_class_accuracy": top1 - 1.25, "num_videos": 50, "num_views": 50 * views, "failed": [],
        "gflops": {"dense": 0.04, "mean": gflops, "min": gflops / 2, "max": gflops * 1.5, "convention": "fvcore"},
        "bins": {"mean": 400 * gflops, "min": 1, "max": 16, "frames": 16, "histogram": {"4": 30, "9": 70}},
        "clips_per_second": speed,
        "protocol": {"views": views, "dataset": name, "checkpoint": str(folder / "checkpoints/best.pt"), "model": model, "commit": "0123456789abcdef0123+"},
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    rows = [f"v{i}.mp4,0,{label},{classes[i % 3 % len(classes)]},0.9,{4 + i % 3},{0.01 * (1 + i % 3)}" for i, label in enumerate(_quoted(classes) * 6)]
    (folder / "predictions.csv").write_text("\n".join(["video,view,label,prediction,score,bins,gflops", *rows]) + "\n")
    metrics = [{"step": step, "epoch": (step - 1) // 10, "split": "train", "loss": 3 - step / 20} for step in range(2, 41, 2)]
    metrics += [{"step": step, "epoch": (step - 1) // 10, "split": "val", "top1": step} for step in (10, 20, 30, 40)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in sorted(metrics, key=lambda line: line["step"])))
    return folder


def _quoted(names: Sequence[str]) -> list[str]:
    return ['"' + name.replace('"', '""') + '"' for name in names]


def report(*paths: Path | str, folder: Path) -> tuple[Parsed, str, Outcome]:
    """Make the page about these paths; return it, its source, and what the program said."""
    outcome = run_tool("report", *map(str, paths), "--output", str(folder / "report.html"), "--csv", str(folder / "runs.csv"))
    assert outcome.code == 0, outcome.err
    page = (folder / "report.html").read_text(encoding="utf-8")
    return Parsed(page), page, outcome


def results_of(folder: Path) -> dict[str, Any]:
    """Read the results of a run folder."""
    return json.loads((folder / "results.json").read_text())
