"""Which files exist, asked for many files at once."""

from __future__ import annotations

import os

from atfr.data.lists.text import without_spelling


class ExistingFiles:
    """The set of paths that exist: `path in ExistingFiles()`. A symbolic link that leads nowhere does not exist.

    Lists each folder once instead of asking for each file: Kinetics has 240,000, often on a network drive.
    """

    def __init__(self) -> None:
        self._folders: dict[str, frozenset[str]] = {}

    def __contains__(self, path: str) -> bool:
        folder, name = os.path.split(path)
        if folder not in self._folders:
            self._folders[folder] = _files(folder)
        return name in self._folders[folder] or os.path.exists(path)


def _files(folder: str) -> frozenset[str]:
    """The names in a folder, without those of symbolic links."""
    if not os.path.isdir(folder):
        return frozenset()
    with os.scandir(folder) as entries:
        return frozenset(entry.name for entry in entries if not entry.is_symlink())


def instead_of(path: str) -> str:
    """Say what is there instead of a missing file, as the end of a message: a similar name, or the folder above. "" if nothing helps."""
    if os.path.islink(path):
        return f"; it is a symbolic link to {os.readlink(path)}, which does not exist"
    part, parent = path, os.path.dirname(path)
    while not os.path.isdir(parent) and parent != os.path.dirname(parent):
        part, parent = parent, os.path.dirname(parent)
    wanted = {without_spelling(os.path.basename(part)), without_spelling(_stem(part))}
    similar = next((name for name in sorted(os.listdir(parent)) if wanted & {without_spelling(name), without_spelling(_stem(name))}), None)
    if similar is not None:
        return f"; there is {os.path.join(parent, similar)}"
    return "" if part == path else f"; there is {parent}, but no {os.path.basename(part)} in it"


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]
