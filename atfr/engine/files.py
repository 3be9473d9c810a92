"""Small text files of a run folder, written whole or not at all."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path


def write_text(path: Path, text: str, *, errors: str = "strict") -> None:
    """Write a UTF-8 file so that a kill, a full disk or a power cut leaves what was there; `errors` as in `open`.

    Raises:
        OSError: it could not be written; names it.
    """
    partial = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial")  # two jobs may write the same file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "w", newline="", encoding="utf-8", errors=errors) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({error.strerror}); make room, or choose another trainer.output_dir") from error


def sync_folder(folder: Path) -> None:
    """Make the renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
