"""Check which files exist, efficiently for many files."""

from __future__ import annotations

import os
from functools import cached_property

from atfr.data.lists.text import normalized_name


class ExistingFiles:
    """The set of paths that exist: `path in ExistingFiles()`. A broken symbolic link does not exist.

    Lists each folder once instead of checking each file: Kinetics has 240,000 files, often on a network drive.
    """

    def __init__(self) -> None:
        self._folders: dict[str, _Names] = {}

    def __contains__(self, path: str) -> bool:
        names, name = self._listed(path)
        return name in names.files or (names.may_have(name) and os.path.exists(path))

    def is_link(self, path: str) -> bool:
        """Return whether a path is a symbolic link to a file that exists."""
        names, name = self._listed(path)
        return name in names.links and os.path.exists(path)

    def _listed(self, path: str) -> tuple[_Names, str]:
        folder, name = os.path.split(path)
        if folder not in self._folders:
            self._folders[folder] = _Names(folder)
        return self._folders[folder], name


class _Names:
    """The names in a folder: symbolic links and other files."""

    def __init__(self, folder: str) -> None:
        entries = list(os.scandir(folder)) if os.path.isdir(folder) else []
        self.links = frozenset(entry.name for entry in entries if entry.is_symlink())
        self.files = frozenset(entry.name for entry in entries if not entry.is_symlink())

    def may_have(self, name: str) -> bool:
        """Return whether `name` may exist although it is not in `files`: a link, the folder itself, or another spelling."""
        return name in self.links or name in ("", ".", "..") or normalized_name(name) in self._spellings

    @cached_property
    def _spellings(self) -> frozenset[str]:
        """The names without differences in case, for file systems that ignore it."""
        return frozenset(map(normalized_name, self.files | self.links))


def existing_path_hint(path: str) -> str:
    """Format the end of an error message about a missing file: a similar path that exists, or ""."""
    if os.path.islink(path):
        return f"; it is a symbolic link to {os.readlink(path)}, which does not exist"
    part, parent = path, os.path.dirname(path)
    while not os.path.isdir(parent) and parent != os.path.dirname(parent):
        part, parent = parent, os.path.dirname(parent)
    wanted = {normalized_name(os.path.basename(part)), normalized_name(stem(part))}
    similar = next((name for name in sorted(os.listdir(parent)) if wanted & {normalized_name(name), normalized_name(stem(name))}), None)
    if similar is not None:
        return f"; there is {os.path.join(parent, similar)}"
    return "" if part == path else f"; there is {parent}, but no {os.path.basename(part)} in it"


def stem(path: str) -> str:
    """Return the name of a file without its suffix."""
    return os.path.splitext(os.path.basename(path))[0]
