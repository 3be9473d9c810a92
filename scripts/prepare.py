"""Check a dataset's videos, note which of them can be read, and make copies that are quick to train from.

    python scripts/prepare.py dataset=ucf101 root=/data/ucf101
    python scripts/prepare.py dataset=kinetics400 root=/data/k400 encode=true output=/data/k400_256

Every video is decoded once, in several processes. OUTPUT/prepared/manifest.csv (OUTPUT is the root unless it is set) then
has a row a video; with dataset.manifest=FILE a training leaves out those that are bad, and nothing else changes.
With encode=true OUTPUT gets H.264 copies under the names of the originals (in mp4 format, whatever the suffix says), and the
lists, so that the same dataset can be read from dataset.root=OUTPUT; the manifest is that of the copies. What cannot be
copied is a link to the original there.
The same command run again goes on where it stopped, and looks again only at what has changed or was bad.
Options: configs/prepare.yaml.
"""

from __future__ import annotations

import math
import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # during the imports, which take seconds

# ruff: noqa: E402
import shlex
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from atfr.cli.config import build, program
from atfr.data.manifest import MANIFEST, SPLITS, Listed, Manifest, listed_videos
from atfr.data.prepare import FOLDER, copy_all, probe_all
from atfr.data.types import VideoSource
from atfr.data.video.probe import Probe
from atfr.data.workers import cores
from atfr.utils.printable import printable

SHOWN = 20  # bad videos that are printed; the manifest has all
LISTS = (".csv", ".txt", ".json")


@dataclass
class Settings:
    """The options beside the dataset, as configs/prepare.yaml explains them."""

    root: Optional[str]
    output: Optional[str]
    encode: bool
    short_side: int
    keyframe: int
    processes: Optional[int]
    timeout_s: float

    def __post_init__(self) -> None:
        for name, least in (("short_side", 2), ("keyframe", 1), ("processes", 1), ("timeout_s", 0)):
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise ValueError(f"{name} is {value}, it must be at least {least}")
        if self.encode and self.output is None:
            raise ValueError("encode=true needs a folder for the copies; add output=DIR to the command")


@program("prepare")
def main(config: DictConfig) -> None:
    given = OmegaConf.masked_copy(config, [str(key) for key in config if key != "dataset"])
    settings: Settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Settings), given))
    if settings.root is not None:
        config.dataset.root = settings.root
    allowed = config.dataset.get("allow_missing", True)
    if not allowed:
        config.dataset.allow_missing = True  # they are listed, whatever training will make of them
    source: VideoSource = build(config.dataset, "dataset")
    for warning in source.warnings:
        say(f"warning: {warning}")
    root = Path(source.notes["root"])
    videos = listed_videos(source, str(root))
    say_missing(videos, source.name, hint=config.dataset.get("prepare_hint"))
    output = Path(os.path.abspath(settings.output)) if settings.output else root
    run = {"processes": settings.processes or cores(), "timeout_s": settings.timeout_s}
    bad: dict[str, Probe] = {}
    if settings.encode:
        bad = copy_all(videos, root=root, output=output, short_side=settings.short_side, keyframe=settings.keyframe, **run)
        copy_lists(config.dataset, root, output)
        root = output
    decoder = config.dataset.clip.decoder
    manifest = Manifest(output / FOLDER, {"dataset": source.name, "root": str(root), "decoder": decoder, "copies": settings.encode})
    probe_all(videos, manifest, root=root, decoder=decoder, bad=bad, **run)
    report(videos, manifest, source.name)
    # The dataset as it was given here, but for its root.
    own = [given for given in HydraConfig.get().overrides.task if given.startswith("dataset") and not given.startswith("dataset.root=")]
    missing = ["dataset.allow_missing=true"] if not allowed and any(video.missing for video in videos) else []
    options = [*own, f"dataset.root={root}", f"dataset.manifest={output / FOLDER / MANIFEST}", *missing]
    say(f"to train without the bad ones: {shlex.join(options)}")


def say_missing(videos: list[Listed], name: str, *, hint: str | None) -> None:
    gone = [video.path for video in videos if video.missing]
    if gone:
        shown = ", ".join(gone[:3]) + (", ..." if len(gone) > 3 else "")
        say(f"{name}: {len(gone)} of the {len(videos)} videos listed are not there ({shown}){f'; {hint}' if hint else ''}")


def copy_lists(dataset: DictConfig, root: Path, output: Path) -> None:
    """Copy the lists under `root` that the dataset's options name, by file or by folder, to the same place in `output`."""
    for value in OmegaConf.to_container(dataset, resolve=False):
        named: Any = dataset[value] if value != "clip" else None
        if not isinstance(named, str):
            continue
        place = Path(os.path.normpath(root / named))
        place = place if place.exists() else Path(os.path.abspath(named))
        if place == root or root not in place.parents:
            continue
        for file in [place] if place.is_file() else place.iterdir() if place.is_dir() else []:
            if file.suffix in LISTS and file.is_file():
                target = output / file.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)


def report(videos: list[Listed], manifest: Manifest, name: str) -> None:
    """Print how many videos are good and which are bad; ValueError if all are."""
    probes = [(video, manifest.probes.get(video.path)) for video in videos]
    path = manifest.folder / MANIFEST
    bad = [(video.path, probe.reason) for video, probe in probes if probe is not None and not probe.good]
    for video, reason in bad[:SHOWN]:
        say(f"bad: {video}: {reason}")
    if len(bad) > SHOWN:
        say(f"... and {len(bad) - SHOWN} more, see {path}")
    counts = Counter(split for video, probe in probes if probe is not None and probe.good for split in video.split.split("+"))
    if not counts:
        raise ValueError(f"dataset {name}: not one of its {len(videos)} videos can be read; {path} says why")
    good = ", ".join(f"{counts[split]} good {split} videos" for split in SPLITS if counts[split])
    say(f"{name}: {good}, {len(bad)} bad, {sum(video.missing for video in videos)} missing; {path}")


def say(line: str) -> None:
    print(printable(line), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        print("stopped by SIGINT; the same command goes on", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
