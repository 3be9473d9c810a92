"""Make text with file names printable."""

from __future__ import annotations


def printable(text: str) -> str:
    """Escape characters that cannot be encoded as UTF-8, such as those of file names in another encoding."""
    return text.encode(errors="backslashreplace").decode()


def shortened(text: str, longest: int) -> str:
    """Return text as one printable line, cut after `longest` letters."""
    text = " ".join(printable(text).split())
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"
