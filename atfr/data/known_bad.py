"""Leaving out of training what a manifest of `scripts/prepare.py` knows to be bad."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from atfr.data.lists.annotations import find_file
from atfr.data.lists.checks import untrained_classes
from atfr.data.manifest import VERSION, read_manifest, shorter
from atfr.data.types import Video, VideoSource
from atfr.data.video.probe import Probe, file_state, quick_hash

_HASHED = 8  # good videos whose hashes are compared, to tell copies of a dataset from the originals
_REMEDY = "give the manifest of this dataset, or make it anew with scripts/prepare.py"


def leave_out_bad(source: VideoSource, manifest: str, *, decoder: str) -> VideoSource:
    """The dataset without the training videos that cannot be read according to `manifest`, a file from its root.

    Nothing else changes, but warnings name the classes that lose all of their training videos. Validation and test videos
    all stay: those that cannot be read fail there, and are reported. Training videos that the manifest does not have stay,
    too. The file and how many it left out or did not have go to the notes.

    Raises FileNotFoundError if there is no such file, and ValueError if it is of another dataset, version or decoder,
    has none of the training videos, or is about other files than those that are there: bad ones that have changed, or
    good ones, of which some are looked at, with another hash.
    """
    root = source.notes["root"]
    path = find_file(manifest, root=root, what="manifest", name=source.name, hint="make it with scripts/prepare.py")
    settings, probes = read_manifest(Path(path))
    for key, ours in (("version", VERSION), ("dataset", source.name), ("decoder", decoder)):
        if settings.get(key) != ours:
            raise ValueError(f"{path} was made for {key} {settings.get(key)!r}, this is {ours!r}; {_REMEDY}")
    found = [(video, probes.get(shorter(video.path, root))) for video in source.train]
    known = [(video, probe) for video, probe in found if probe is not None]
    if not known:
        raise ValueError(f"{path} has none of the {len(found)} training videos ({found[0][0].path}, ...); {_REMEDY}")
    other = next(_other_files(known), None)
    if other is not None:
        raise ValueError(f"{other.path} is not as it was when {path} was made; {_REMEDY}")
    kept = tuple(video for video, probe in found if probe is None or probe.good)
    if not kept:
        raise ValueError(f"dataset {source.name}: not one of its {len(found)} training videos can be read; {path} says why")
    lost = {video.label for video in source.train} - {video.label for video in kept}
    files = {**source.notes["lists"], "train": path}
    there = {"train": kept} | {split: getattr(source, split) for split in ("val", "test") if split in files}
    warnings = tuple(untrained_classes(source.class_names, there, files=files)) if lost else ()
    notes = {"file": path, "left_out": len(found) - len(kept), "not_in_it": len(found) - len(known)}
    return replace(source, train=kept, notes={**source.notes, "manifest": notes}, warnings=(*source.warnings, *warnings))


def _other_files(known: Sequence[tuple[Video, Probe]]) -> Iterator[Video]:
    """The videos whose files are not those that were probed: all of the bad ones are looked at, and some of the good."""
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
