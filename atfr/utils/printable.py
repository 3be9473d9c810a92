"""Make text with file names printable."""

from __future__ import annotations


def printable(text: str) -> str:
    """Escape characters that cannot be encoded as UTF-8, such as those of file names in another encoding."""
    return text.encode(errors="backslashreplace").decode()
