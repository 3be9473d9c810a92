"""Expand `~` in paths."""

from __future__ import annotations

import os


def expanded(path: str, option: str = "path") -> str:
    """Replace a leading `~` or `~user` by that home directory.

    Raises:
        ValueError: there is no such home directory; the message names `option`.
    """
    found = os.path.expanduser(path)
    if found.startswith("~"):
        user = found.split("/")[0]
        raise ValueError(f"{option}={path}: {user} is no home directory on this machine; write ./{path} for a file or folder of that name")
    return found
