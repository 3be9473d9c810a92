"""Text as people write it: files in several encodings, names in several spellings."""

from __future__ import annotations

import codecs
import io
import unicodedata

# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(file: str) -> str:
    """Decode a file: UTF-8, or what its byte order mark says. Every line end becomes a newline.

    Bytes that are not UTF-8 are kept as surrogate escapes, as `os.listdir` has them in file names.

    Raises:
        ValueError: the file has NUL bytes, as UTF-16 without a byte order mark has, or does not fit its mark.
    """
    with open(file, "rb") as stream:
        data = stream.read()
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding, errors="surrogateescape" if encoding.startswith("utf-8") else "strict")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: begins with the byte order mark of {encoding.upper()}, but is not {encoding.upper()} ({error.reason})") from None
    text = io.IncrementalNewlineDecoder(None, translate=True).decode(text, final=True)
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{file}:{line}: the file has NUL bytes; if it is UTF-16 without a byte order mark, save it as UTF-8")
    return text


def without_spelling(name: str) -> str:
    """A name without what spellings differ in: case, blanks or underscores, composed or decomposed accents."""
    return unicodedata.normalize("NFC", name).casefold().replace("_", " ").strip()
