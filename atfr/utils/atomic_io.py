"""Write files atomically: a reader sees the old file or the whole new one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_write(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path that is renamed to `path` when the block ends, or deleted if it raises.

    The temporary name is unique, so several processes may write the same file. `durable` flushes it to disk.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        yield temporary
        if durable:
            _sync(temporary)
        os.replace(temporary, path)
        if durable:
            _sync(path.parent)
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


def sync_folder(folder: Path) -> None:
    """Flush the renames in a folder to disk."""
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
