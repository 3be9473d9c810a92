"""Check which videos of a dataset can be read, and optionally make copies that are fast to train from.

    python scripts/prepare.py dataset=ucf101 root=/data/ucf101
    python scripts/prepare.py dataset=kinetics400 root=/data/k400 encode=true output=/data/k400_256

Decodes each video once, in several processes, and writes OUTPUT/prepared/manifest.csv (OUTPUT: default is the root) with a
row per video. With dataset.manifest=FILE, training leaves out the bad videos.
With encode=true, OUTPUT gets H.264 copies with the names of the originals (in mp4 format, whatever the suffix) and the
lists, so that it can be used as dataset.root; the manifest is that of the copies. Videos that cannot be encoded become
links to the originals.
Run the same command again to continue an interrupted run. It probes only videos that have changed or were bad.
Options: configs/prepare.yaml.
"""

from __future__ import annotations

import math
import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # imports take seconds

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
from atfr.data.manifest import MANIFEST, SPLITS, ListedVideo, Manifest, listed_videos
from atfr.data.prepare import FOLDER, copy_all, probe_all
from atfr.data.types import VideoSource
from atfr.data.video.probe import Probe
from atfr.data.workers import cores
from atfr.utils.printable import printable

SHOWN = 20  # number of bad videos that are printed
LISTS = (".csv", ".txt", ".json")


@dataclass
class Settings:
    """Options of configs/prepare.yaml besides the dataset."""

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
            raise ValueError("encode=true needs a folder for the copies; add output=DIR")


@program("prepare")
def main(config: DictConfig) -> None:
    given = OmegaConf.masked_copy(config, [str(key) for key in config if key != "dataset"])
    settings: Settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Settings), given))
    if settings.root is not None:
        config.dataset.root = settings.root
    allowed = config.dataset.get("allow_missing", True)
    if not allowed:
        config.dataset.allow_missing = True  # the manifest lists missing videos
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
    # The dataset options of this command, with the new root.
    own = [given for given in HydraConfig.get().overrides.task if given.startswith("dataset") and not given.startswith("dataset.root=")]
    missing = ["dataset.allow_missing=true"] if not allowed and any(video.missing for video in videos) else []
    options = [*own, f"dataset.root={root}", f"dataset.manifest={output / FOLDER / MANIFEST}", *missing]
    say(f"to train without bad videos: {shlex.join(options)}")


def say_missing(videos: list[ListedVideo], name: str, *, hint: str | None) -> None:
    gone = [video.path for video in videos if video.missing]
    if gone:
        shown = ", ".join(gone[:3]) + (", ..." if len(gone) > 3 else "")
        say(f"{name}: {len(gone)} of the {len(videos)} listed videos are missing ({shown}){f'; {hint}' if hint else ''}")


def copy_lists(dataset: DictConfig, root: Path, output: Path) -> None:
    """Copy the lists under `root` that the dataset's options name, as files or folders, to the same path in `output`."""
    for value in OmegaConf.to_container(dataset, resolve=False):
        named: Any = dataset[value] if value != "clip" else None
        if not isinstance(named, str):
            continue
        path = Path(os.path.normpath(root / named))
        path = path if path.exists() else Path(os.path.abspath(named))
        if path == root or root not in path.parents:
            continue
        for file in [path] if path.is_file() else path.iterdir() if path.is_dir() else []:
            if file.suffix in LISTS and file.is_file():
                target = output / file.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)


def report(videos: list[ListedVideo], manifest: Manifest, name: str) -> None:
    """Print how many videos are good and which are bad; raise ValueError if none is good."""
    probes = [(video, manifest.probes.get(video.path)) for video in videos]
    path = manifest.folder / MANIFEST
    bad = [(video.path, probe.reason) for video, probe in probes if probe is not None and not probe.good]
    for video, reason in bad[:SHOWN]:
        say(f"bad: {video}: {reason}")
    if len(bad) > SHOWN:
        say(f"... and {len(bad) - SHOWN} more, see {path}")
    counts = Counter(split for video, probe in probes if probe is not None and probe.good for split in video.split.split("+"))
    if not counts:
        raise ValueError(f"dataset {name}: none of its {len(videos)} videos can be read, see {path}")
    good = ", ".join(f"{counts[split]} good {split} videos" for split in SPLITS if counts[split])
    say(f"{name}: {good}, {len(bad)} bad, {sum(video.missing for video in videos)} missing; {path}")


def say(line: str) -> None:
    print(printable(line), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        print("stopped by SIGINT; run the same command again to continue", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
