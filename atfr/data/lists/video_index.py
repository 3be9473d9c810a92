"""Find videos by name in a folder of class folders; spellings of classes and suffixes may differ."""

from __future__ import annotations

import os
import re

from atfr.data.lists.text import normalized_name

SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")
_TIMES = re.compile(r"_\d{6}_\d{6}$")  # start and end of a trimmed YouTube video, in seconds


def youtube_id(stem: str) -> str:
    """Remove the trim times from the name of a video."""
    return _TIMES.sub("", stem)


class VideoIndex:
    """The videos in a folder and its subfolders; empty if there is no such folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._paths: dict[str, list[str]] = {}  # by stem: paths relative to `folder`
        self._stems: dict[str, set[str]] = {}  # by YouTube id
        if not os.path.isdir(folder):
            return
        for subfolder in ("", *sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())):
            with os.scandir(os.path.join(folder, subfolder)) as entries:
                there = sorted(entry.name for entry in entries if not entry.is_symlink() or os.path.exists(entry.path))
            for file in there:
                stem, suffix = os.path.splitext(file)
                if suffix.lower() in SUFFIXES:
                    self._paths.setdefault(stem, []).append(os.path.join(subfolder, file))
                    self._stems.setdefault(youtube_id(stem), set()).add(stem)

    def find(self, stem: str, class_name: str) -> str | None:
        """Return the path of a video with this stem relative to the folder, preferably in its class folder, or None."""
        paths = self._paths.get(stem, [])
        wanted = normalized_name(class_name)
        return next((path for path in paths if normalized_name(path.split("/")[0]) == wanted), paths[0] if paths else None)

    def find_part(self, video_id: str, class_name: str) -> str | None:
        """Return the path of the only trimmed part of a YouTube video, or None."""
        stems = self._stems.get(video_id, set())
        return self.find(next(iter(stems)), class_name) if len(stems) == 1 else None
