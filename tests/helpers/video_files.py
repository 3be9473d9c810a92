"""Small videos for the tests. The mean grey level of frame k stands for k, so a frame says which one it is."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

_FIRST, _STEP = 10, 4
MOST_FRAMES = 60


def write_video(
    path: Path,
    frames: int | np.ndarray,
    *,
    codec: str = "mpeg4",
    size: tuple[int, int] = (64, 48),
    gop: int = 12,
    rate: int = 10,
    title: str = "",
) -> str:
    """Writes numbered frames, or those given as uint8 [T, H, W, 3]."""
    frames = numbered(frames, size) if isinstance(frames, int) else frames
    try:
        av.codec.Codec(codec, "w")
    except av.error.FFmpegError:
        pytest.skip(f"this PyAV has no encoder {codec}")
    with av.open(str(path), "w") as container:
        if title:
            container.metadata["title"] = title
        stream = container.add_stream(codec, rate=Fraction(rate))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.gop_size = gop
        if codec == "mpeg4":
            stream.bit_rate = 2_000_000
        for array in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")))
        container.mux(stream.encode(None))
    return str(path)


def numbered(frames: int, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """uint8 [frames, H, W, 3]."""
    assert frames <= MOST_FRAMES
    # Some noise, so that packets are as large as those of real videos.
    noise = np.random.default_rng(0).integers(-8, 9, (frames, size[1], size[0], 1))
    levels = _FIRST + _STEP * np.arange(frames)[:, None, None, None] + noise
    return np.broadcast_to(levels.clip(0, 255).astype(np.uint8), (frames, size[1], size[0], 3))


def write_at(path: Path, times: list[int], **options: str) -> str:
    """Writes numbered frames that come at these milliseconds."""
    clock = Fraction(1, 1000)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options=options)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = 48, 64, "yuv420p", 10
        stream.codec_context.time_base = clock
        for time, array in zip(times, numbered(len(times))):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            frame.pts, frame.time_base = time, clock
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def damage(path: str, packet: int) -> str:
    """Overwrites one packet of a file."""
    with av.open(path) as container:
        places = [(item.pos, item.size) for item in container.demux(video=0) if item.size]
    with open(path, "r+b") as stream:
        stream.seek(places[packet][0])
        stream.write(b"\xff" * places[packet][1])
    return path


def write_sound(path: Path) -> str:
    """A file with a sound track and nothing else."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


def numbers(clip: np.ndarray) -> list[int]:
    """Which frames these are: uint8 [T, ...] -> T numbers."""
    levels = np.asarray(clip).reshape(len(clip), -1).mean(axis=1)
    # Coding and scaling darken a frame, by 0.1 to 0.5 of a step.
    return np.rint((levels - _FIRST) / _STEP + 0.3).astype(int).tolist()


def lie_about_duration(path: str, factor: int) -> str:
    """Multiplies the duration that the header of an mp4 file gives its track."""
    data = bytearray(Path(path).read_bytes())
    field = data.index(b"mdhd") + 20  # after version and flags, two dates and the time scale
    duration = int.from_bytes(data[field : field + 4], "big")
    data[field : field + 4] = (duration * factor).to_bytes(4, "big")
    Path(path).write_bytes(data)
    return path


def lay_down(path: str) -> str:
    """Gives the track of an mp4 file a display rotation by 90 degrees, as phones write it."""
    data = bytearray(Path(path).read_bytes())
    matrix = data.index(b"tkhd") + 44
    quarter = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    data[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in quarter)
    Path(path).write_bytes(data)
    return path


def write_jpgs(folder: Path, frames: np.ndarray) -> str:
    """A folder with frames uint8 [T, H, W, 3] as img_1.jpg, img_2.jpg, ... and a file that is no frame."""
    folder.mkdir()
    for number, frame in enumerate(frames, start=1):
        Image.fromarray(frame).save(folder / f"img_{number}.jpg", quality=95)
    (folder / "notes.txt").write_text("not a frame")
    return str(folder)
