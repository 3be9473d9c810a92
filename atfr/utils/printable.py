"""Make text with file names printable."""

from __future__ import annotations


def printable(text: str) -> str:
    """Escape characters that cannot be encoded as UTF-8, such as those of file names in another encoding."""
    return text.encode(errors="backslashreplace").decode()


def one_line(text: str) -> str:
    """Return text as one printable line."""
    return " ".join(printable(text).split())


def shortened(text: str, longest: int) -> str:
    """Return text as one printable line, cut after `longest` letters."""
    text = one_line(text)
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"
