"""Probing and copying all videos of a dataset, in parallel, going on from where a killed run stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from atfr.data.manifest import Listed, Manifest
from atfr.data.video.encode import encode, is_copied
from atfr.data.video.probe import Probe, file_state, probe
from atfr.data.workers import Alive, Outcome, run_each
from atfr.utils.atomic_io import written_whole
from atfr.utils.progress import watched

FOLDER = "prepared"  # of what is written here, in the folder that it is about
COPIES = "copies.json"  # how the copies beside it were made


def probe_all(
    videos: Sequence[Listed],
    manifest: Manifest,
    *,
    root: Path,
    decoder: str,
    processes: int,
    timeout_s: float,
    bad: Mapping[str, Probe] | None = None,
) -> None:
    """Bring the manifest up to date, and finish it; `bad` has the videos, by path, that need no look."""
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
    videos: Sequence[Listed], *, root: Path, output: Path, short_side: int, keyframe: int, processes: int, timeout_s: float
) -> dict[str, Probe]:
    """Encode copies of the videos in the same places under `output`; by path, those that cannot be read, and why.

    These have a link to the original in their place, as have folders of frames, so that `output` has the same videos as
    `root`. Those outside `root`, which the lists name by their whole paths, stay where they are.
    Raises ValueError where `output` has other files in these places.
    """
    places = [(video.path, str(root / video.path), output / video.path) for video in videos if not video.missing and not os.path.isabs(video.path)]
    _claim(output, {"short_side": short_side, "keyframe": keyframe}, (target for _, _, target in places))
    for folder in {target.parent for _, _, target in places}:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".*.tmp"):  # by a run that was killed
            left.unlink()
    bad: dict[str, Probe] = {}
    todo = [place for place in places if not os.path.isdir(place[1]) and not is_copied(place[1], place[2])]
    outcomes = run_each(partial(_copy, short_side=short_side, keyframe=keyframe), todo, processes=processes, timeout_s=timeout_s)
    with closing(outcomes):
        for (path, original, _), _, reason in _bar(outcomes, todo, places, "encode"):
            if reason:
                bad[path] = Probe(file_state(original), reason=f"not copied: {reason}")
    for path, original, target in places:
        if (path in bad or os.path.isdir(original)) and not target.is_symlink():
            target.unlink(missing_ok=True)  # the copy of what the original was before
            target.symlink_to(original)
    return bad


def _claim(output: Path, settings: Mapping[str, Any], targets: Iterable[Path]) -> None:
    """Note in `output` how its copies are made; ValueError if it holds other ones, or files of another kind."""
    note = output / FOLDER / COPIES
    way_out = "give another output"
    if note.exists():
        found = json.loads(note.read_text())
        if found != settings:
            raise ValueError(f"{note}: the copies there were made with {found}, not {dict(settings)}; {way_out}")
        return
    taken = next((target for target in targets if os.path.lexists(target)), None)
    if taken is not None:
        raise ValueError(f"{taken} is there already, and is no copy that was made here; {way_out}")
    note.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(note) as temporary:
        temporary.write_text(json.dumps(settings) + "\n")


def _bar(outcomes: Iterable[Outcome], todo: Sequence[Any], wanted: Sequence[Any] | Mapping[str, Any], name: str) -> Iterable[Outcome]:
    return watched(outcomes, name, unit="video", total=len(wanted), initial=len(wanted) - len(todo), leave=True)


def _probe(path: str, alive: Alive, *, decoder: str) -> Probe:
    return probe(path, decoder=decoder)


def _copy(place: tuple[str, str, Path], alive: Alive, *, short_side: int, keyframe: int) -> bool:
    _, source, target = place
    if target.is_symlink():  # it could not be copied before
        target.unlink()
    encode(source, target, short_side=short_side, keyframe=keyframe, alive=alive)
    return True
