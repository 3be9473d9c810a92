"""Videos by name in a folder of class folders, whatever the spelling of these and the suffixes."""

from __future__ import annotations

import os
import re

from atfr.data.lists.text import without_spelling

SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")
_TIMES = re.compile(r"_\d{6}_\d{6}$")  # start and end of a trimmed YouTube video, in seconds


def youtube_id(stem: str) -> str:
    """The name of a video without the times that it was trimmed to."""
    return _TIMES.sub("", stem)


class VideoIndex:
    """The videos in a folder and in the folders in it. Empty if there is no such folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._paths: dict[str, list[str]] = {}  # by their names without suffix: from `folder`
        self._stems: dict[str, set[str]] = {}  # by YouTube id
        if not os.path.isdir(folder):
            return
        for place in ("", *sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())):
            with os.scandir(os.path.join(folder, place)) as entries:
                there = sorted(entry.name for entry in entries if not entry.is_symlink() or os.path.exists(entry.path))
            for file in there:
                stem, suffix = os.path.splitext(file)
                if suffix.lower() in SUFFIXES:
                    self._paths.setdefault(stem, []).append(os.path.join(place, file))
                    self._stems.setdefault(youtube_id(stem), set()).add(stem)

    def find(self, stem: str, class_name: str) -> str | None:
        """The path, from the folder, of a video with this name; that in the folder of its class if there are several."""
        paths = self._paths.get(stem, [])
        wanted = without_spelling(class_name)
        return next((path for path in paths if without_spelling(path.split("/")[0]) == wanted), paths[0] if paths else None)

    def find_part(self, video_id: str, class_name: str) -> str | None:
        """Return the path of a YouTube video's only trimmed part, or None."""
        stems = self._stems.get(video_id, set())
        return self.find(next(iter(stems)), class_name) if len(stems) == 1 else None
