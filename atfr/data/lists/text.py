"""Read text files in several encodings, compare names in several spellings, and list and count them in messages."""

from __future__ import annotations

import codecs
import io
import unicodedata
from collections.abc import Sequence

# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SAMPLE = 4096  # bytes that tell UTF-16 without a byte order mark
_ASCII_SHARE = 0.2  # least part of ASCII characters in such a file: separators, digits, file suffixes


def read_text(file: str) -> str:
    """Decode a text file and convert its line ends to newlines.

    The encoding is UTF-16 or UTF-32 with a byte order mark, UTF-16 without one, or else UTF-8. Bytes that are not UTF-8
    become surrogate escapes, as in file names from `os.listdir`.

    Raises:
        ValueError: the file does not match its byte order mark, or has NUL bytes and is not UTF-16.
    """
    with open(file, "rb") as stream:
        data = stream.read()
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None)
    if encoding is None:
        text = _unmarked(data)
    else:
        try:
            text = data.decode(encoding, errors="surrogateescape" if encoding == "utf-8-sig" else "strict")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: begins with the byte order mark of {encoding.upper()}, but is not {encoding.upper()} ({error.reason})") from None
    text = io.IncrementalNewlineDecoder(None, translate=True).decode(text, final=True)
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{file}:{line}: the file has NUL bytes; save it as UTF-8")
    return text


def _unmarked(data: bytes) -> str:
    """Decode UTF-16 or UTF-8 without a byte order mark.

    In UTF-16, one byte of each ASCII character is NUL: the second in little-endian order, the first in big-endian order.
    """
    even, odd = (data[first:_SAMPLE:2].count(0) for first in (0, 1))
    if max(even, odd) >= _ASCII_SHARE * len(data[:_SAMPLE]) / 2 and min(even, odd) == 0 < max(even, odd):
        try:
            return data.decode("utf-16-le" if odd else "utf-16-be")
        except UnicodeDecodeError:
            pass
    return data.decode("utf-8", errors="surrogateescape")


def some(names: Sequence[str], shown: int = 3) -> str:
    """Join the first few names, and `...` if there are more."""
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")


def counted(number: int, one: str, many: str) -> str:
    """Return a number with its noun: `1 class`, `2 classes`."""
    return f"{number} {one if number == 1 else many}"


def normalized_name(name: str) -> str:
    """Normalise what spellings of a name differ in: case, blanks or underscores, composed or decomposed accents."""
    return unicodedata.normalize("NFC", name).casefold().replace("_", " ").strip()
