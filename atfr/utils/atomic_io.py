"""Write files atomically: a reader sees the old file or the whole new one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_write(path: Path, *, durable: bool = False, only_writer: bool = False) -> Iterator[Path]:
    """Yield a temporary path, and rename it to `path` when the block ends. After an error the temporary file is removed.

    Args:
        durable: the file survives a power cut.
        only_writer: no other process writes `path` at the same time. The temporary name is then fixed, so the next write
            replaces a file that a kill has left. Otherwise the name is unique among all machines.
    """
    temporary = path.with_name(f".{path.name}.tmp" if only_writer else f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, errors: str = "strict") -> None:
    """Write a UTF-8 file. A kill, a full disk or a power cut leaves the old file. `errors` as in `open`.

    Raises:
        OSError: the file cannot be written; the message names it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, durable=True) as temporary, open(temporary, "w", newline="", encoding="utf-8", errors=errors) as file:
            file.write(text)
    except OSError as error:
        raise OSError(f"{path} could not be written ({error.strerror}); make room, or choose another trainer.output_dir") from error


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
