"""Text that can be printed whatever names of files are in it."""

from __future__ import annotations


def printable(text: str) -> str:
    """Escape what is not UTF-8, as in the names of files that are not."""
    return text.encode(errors="backslashreplace").decode()
