"""The cache of decoded clips: damaged files and folders that cannot be used."""

import errno
import logging
import shutil
from io import BytesIO

import numpy as np
import pytest

from atfr.data import warn_once
from atfr.data.video import cache
from atfr.data.video.cache import cached
from atfr.data.video.decode import Decoded

FRAMES = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def reads(tmp_path, monkeypatch):
    """A function that reads a clip through the cache, and a list that grows with each decoding."""
    monkeypatch.setattr(warn_once, "_given", set())
    video, decoded = tmp_path / "a.mp4", []
    video.touch()

    def decode() -> Decoded:
        decoded.append(True)
        return Decoded(FRAMES, "pyav", 40, None)

    def read(key: tuple = ("train",)) -> Decoded:
        return cached(decode, tmp_path / "cache", str(video), key)

    return read, decoded, tmp_path / "cache"


def same(clip: Decoded) -> bool:
    return np.array_equal(clip.frames, FRAMES) and clip[1:] == ("pyav", 40, None)


def flip(content: bytes) -> bytes:
    """Another byte in the middle of the pixels."""
    place = content.index(FRAMES.tobytes()[300:320])
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def other(content: bytes) -> bytes:
    """A whole file with other arrays."""
    file = BytesIO()
    np.savez(file, pixels=FRAMES)
    return file.getvalue()


@pytest.mark.parametrize(
    "damage",
    [lambda whole: b"", lambda whole: whole[:-30], flip, other],
    ids=["empty", "end missing", "a bit", "other arrays"],
)
def test_a_damaged_clip_is_decoded_again_and_replaced_with_a_warning_that_names_its_file(reads, damage, caplog):
    read, decoded, folder = reads
    assert same(read()) and same(read()) and len(decoded) == 1
    (file,) = folder.rglob("*.npz")
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert same(read()) and len(decoded) == 2 and len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert str(file) in message and "decoded again" in message and "\n" not in message
    assert same(read()) and len(decoded) == 2 and file.read_bytes() == whole and len(caplog.records) == 1


def test_clips_of_another_version_are_not_read(reads, monkeypatch):
    read, decoded, _ = reads
    read()
    monkeypatch.setattr(cache, "VERSION", cache.VERSION + 1)
    read()
    assert len(decoded) == 2


def test_what_cannot_be_written_is_not_kept_with_one_warning(reads, monkeypatch, caplog):
    read, decoded, folder = reads
    save = np.savez

    def fail(file, **arrays):
        save(file, **arrays)
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(np, "savez", fail)
    assert all(same(read((key,))) for key in range(3)) and len(decoded) == 3
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and f"cannot write to {folder} (disk full)" in record.getMessage()
    assert not [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("place", ["the folder", "a folder in it"])
def test_a_file_in_the_place_of_a_folder_does_not_end_a_run_and_is_one_warning(reads, place, caplog):
    read, decoded, folder = reads
    read()
    (first,) = folder.rglob("*.npz")
    blocked = folder if place == "the folder" else first.parent
    shutil.rmtree(blocked)
    blocked.write_text("not a folder")
    decoded.clear()
    assert all(same(read()) for _ in range(3)) and len(decoded) == 3
    (record,) = caplog.records
    assert f"cannot write to {folder}" in record.getMessage()


def test_a_folder_that_cannot_be_read_does_not_end_a_run_and_is_one_warning(reads, monkeypatch, caplog):
    read, decoded, folder = reads

    def fail(file):
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(np, "load", fail)
    assert all(same(read((key,))) for key in range(3)) and len(decoded) == 3
    (record,) = caplog.records
    assert f"cannot read from {folder} (I/O error)" in record.getMessage()
