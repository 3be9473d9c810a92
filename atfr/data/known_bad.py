"""Exclude training videos that a manifest of `scripts/prepare.py` lists as bad."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from atfr.data.lists.annotations import find_file
from atfr.data.lists.checks import untrained_classes
from atfr.data.manifest import VERSION, path_in_manifest, read_manifest
from atfr.data.types import Video, VideoSource
from atfr.data.video.probe import Probe, file_state, quick_hash

_HASHED = 8  # number of good videos whose hashes are compared, to detect other copies of a dataset
_REMEDY = "give the manifest of this dataset, or make a new one with scripts/prepare.py"


def leave_out_bad(source: VideoSource, manifest: str, *, decoder: str) -> VideoSource:
    """Return the dataset without the training videos that are bad according to `manifest`, a file under its root.

    Unknown training videos stay, as do all validation and test videos: an evaluation reports the bad ones. The notes
    record the file and the numbers of excluded and unknown videos. Warnings name the classes that lose all training
    videos.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the manifest is of another dataset, version or decoder, has none of the training videos, or was made
            from other files (a bad file has changed, or a sample of the good ones has other hashes).
    """
    root = source.notes["root"]
    path = find_file(manifest, root=root, what="manifest", name=source.name, hint="make it with scripts/prepare.py")
    settings, probes = read_manifest(Path(path))
    for key, ours in (("version", VERSION), ("dataset", source.name), ("decoder", decoder)):
        if settings.get(key) != ours:
            raise ValueError(f"{path} was made for {key} {settings.get(key)!r}, not {ours!r}; {_REMEDY}")
    found = [(video, probes.get(path_in_manifest(video.path, root))) for video in source.train]
    known = [(video, probe) for video, probe in found if probe is not None]
    if not known:
        raise ValueError(f"{path} has none of the {len(found)} training videos ({found[0][0].path}, ...); {_REMEDY}")
    changed = next(_changed_files(known), None)
    if changed is not None:
        raise ValueError(f"{changed.path} has changed since {path} was made; {_REMEDY}")
    kept = tuple(video for video, probe in found if probe is None or probe.good)
    if not kept:
        raise ValueError(f"dataset {source.name}: none of its {len(found)} training videos can be read, see {path}")
    lost = {video.label for video in source.train} - {video.label for video in kept}
    files = {**source.notes["lists"], "train": path}
    there = {"train": kept} | {split: getattr(source, split) for split in ("val", "test") if split in files}
    warnings = tuple(untrained_classes(source.class_names, there, files=files)) if lost else ()
    notes = {"file": path, "left_out": len(found) - len(kept), "not_in_it": len(found) - len(known)}
    return replace(source, train=kept, notes={**source.notes, "manifest": notes}, warnings=(*source.warnings, *warnings))


def _changed_files(known: Sequence[tuple[Video, Probe]]) -> Iterator[Video]:
    """Yield videos whose files have changed since they were probed; checks all bad videos and a sample of the good."""
    good = [(video, probe) for video, probe in known if probe.good]
    for video, probe in known:
        if not probe.good and file_state(video.path) != probe.state:
            yield video
    for video, probe in good[:: max(1, len(good) // _HASHED)]:
        try:
            if quick_hash(video.path) != probe.quick_hash:
                yield video
        except OSError:
            yield video
