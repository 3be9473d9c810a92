"""Probe and copy all videos of a dataset in parallel; a killed run continues where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from atfr.data.manifest import ListedVideo, Manifest
from atfr.data.video.encode import encode, is_copied
from atfr.data.video.probe import Probe, file_state, probe
from atfr.data.workers import Heartbeat, Outcome, run_each
from atfr.utils.atomic_io import atomic_write
from atfr.utils.progress import watched

FOLDER = "prepared"  # in the dataset's root or the output: the manifest and COPIES
COPIES = "copies.json"  # settings of the copies in the output


def probe_all(
    videos: Sequence[ListedVideo],
    manifest: Manifest,
    *,
    root: Path,
    decoder: str,
    processes: int,
    timeout_s: float,
    bad: Mapping[str, Probe] | None = None,
) -> None:
    """Probe new and changed videos, and write the manifest. `bad` has known probes by path, which are not repeated."""
    bad = bad or {}
    for video in videos:
        if video.path in bad:
            manifest.add(video, bad[video.path])
    there = {str(root / video.path): video for video in videos if not video.missing and video.path not in bad}
    todo = [path for path, video in there.items() if not (video.path in manifest.probes and manifest.knows(video.path, file_state(path)))]
    outcomes = run_each(partial(_probe, decoder=decoder), todo, processes=processes, timeout_s=timeout_s)
    with closing(outcomes):
        for path, result, reason in _bar(outcomes, todo, there, "probe"):
            manifest.add(there[path], result or Probe(file_state(path), reason=reason))
    manifest.finish(videos)


def copy_all(
    videos: Sequence[ListedVideo], *, root: Path, output: Path, short_side: int, keyframe: int, processes: int, timeout_s: float
) -> dict[str, Probe]:
    """Encode a copy of each video under `output`, with the same relative path; return the probes of those that failed.

    A video that cannot be encoded becomes a link to the original, as does a folder of frames, so that `output` has the
    same videos as `root`. Videos outside `root` (absolute paths in the lists) are not copied.

    Raises:
        ValueError: `output` holds other files at these paths.
    """
    copies = [(video.path, str(root / video.path), output / video.path) for video in videos if not video.missing and not os.path.isabs(video.path)]
    _claim(output, {"short_side": short_side, "keyframe": keyframe}, (target for _, _, target in copies))
    for folder in {target.parent for _, _, target in copies}:
        folder.mkdir(parents=True, exist_ok=True)
        for temporary in folder.glob(".*.tmp"):  # left by a killed run
            temporary.unlink()
    bad: dict[str, Probe] = {}
    todo = [copy for copy in copies if not os.path.isdir(copy[1]) and not is_copied(copy[1], copy[2])]
    outcomes = run_each(partial(_copy, short_side=short_side, keyframe=keyframe), todo, processes=processes, timeout_s=timeout_s)
    with closing(outcomes):
        for (path, original, _), _, reason in _bar(outcomes, todo, copies, "encode"):
            if reason:
                bad[path] = Probe(file_state(original), reason=f"not copied: {reason}")
    for path, original, target in copies:
        if (path in bad or os.path.isdir(original)) and not target.is_symlink():
            target.unlink(missing_ok=True)  # a copy of an earlier version of the original
            target.symlink_to(original)
    return bad


def _claim(output: Path, settings: Mapping[str, Any], targets: Iterable[Path]) -> None:
    """Save the settings of the copies in `output`; raise ValueError if it holds other copies or other files."""
    note = output / FOLDER / COPIES
    if note.exists():
        found = json.loads(note.read_text())
        if found != settings:
            raise ValueError(f"{note}: the copies there were made with {found}, not {dict(settings)}; give another output")
        return
    taken = next((target for target in targets if os.path.lexists(target)), None)
    if taken is not None:
        raise ValueError(f"{taken} exists and is not a copy made by this script; give another output")
    note.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(note) as temporary:
        temporary.write_text(json.dumps(settings) + "\n")


def _bar(outcomes: Iterable[Outcome], todo: Sequence[Any], wanted: Sequence[Any] | Mapping[str, Any], name: str) -> Iterable[Outcome]:
    return watched(outcomes, name, unit="video", total=len(wanted), initial=len(wanted) - len(todo), leave=True)


def _probe(path: str, heartbeat: Heartbeat, *, decoder: str) -> Probe:
    return probe(path, decoder=decoder)


def _copy(paths: tuple[str, str, Path], heartbeat: Heartbeat, *, short_side: int, keyframe: int) -> bool:
    _, source, target = paths
    if target.is_symlink():  # encoding failed before
        target.unlink()
    encode(source, target, short_side=short_side, keyframe=keyframe, heartbeat=heartbeat)
    return True
