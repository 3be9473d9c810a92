"""Small copies of a set of real clips, so that reading them is no part of what the study (studies/claim/claim.py) waits for.

A clip of 300 to 1280 pixels takes longer to decode than the tiny networks take to learn from it. The copies have
the same frames with a shorter side of 64 pixels, as H.264, and the lists beside them. The originals stay as they
are; what is copied already is not copied again.
"""

from __future__ import annotations

import csv
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Sequence

from tqdm import tqdm

from atfr.data.video.encode import encode
from atfr.utils.atomic_io import write_text

SHORT_SIDE, KEYFRAME = 64, 12


def shrink(source: Path, target: Path, *, lists: Sequence[str], processes: int) -> None:
    """Copy the videos that these lists of `source` name, and last the lists."""
    if all((target / name).exists() for name in lists):
        return
    rows = {name: read_list(source / name) for name in lists}
    paths = [row[0] for _, *lines in rows.values() for row in lines]
    with ProcessPoolExecutor(processes) as pool:
        for _ in tqdm(pool.map(partial(copy, source, target), paths), total=len(paths), unit="video", desc=f"{source.name} -> {target}"):
            pass
    for name, (header, *lines) in rows.items():
        copied = [[copied_path(path), *others] for path, *others in lines]
        write_text(target / name, "".join(f"{','.join(row)}\n" for row in [header, *copied]))


def read_list(path: Path) -> list[list[str]]:
    try:
        with open(path, newline="") as file:
            return list(csv.reader(file))
    except FileNotFoundError:
        raise SystemExit(f"{path} is missing: --clips names the folder that has the sets of real clips, each with its lists") from None


def copied_path(path: str) -> str:
    return str(Path(path).with_suffix(".mp4"))


def copy(source: Path, target: Path, path: str) -> None:
    to = target / copied_path(path)
    if not to.exists():
        to.parent.mkdir(parents=True, exist_ok=True)
        encode(str(source / path), to, short_side=SHORT_SIDE, keyframe=KEYFRAME)
