"""Where frames lie in a file: what its own table says, what is kept of a file, and its rate and times."""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from video_files import numbers, write_at, write_video

from atfr.data.clips import ClipSettings, TestClips
from atfr.data.types import Video
from atfr.data.video import av_reader, frame_index
from atfr.data.video.av_reader import AvVideo
from atfr.data.video.frame_index import FrameIndex, times_if_variable


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(av_reader, "index_cache", frame_index.IndexCache())


def remuxed(path: str, target: Path, *, earlier: int = 0, **options: str) -> str:
    """The packets of a video in another file, `earlier` frames earlier: those before 0 lie outside the edit list of an mp4 file."""
    with av.open(path) as source, av.open(str(target), "w", options=options) as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        step = int(1 / (10 * source.streams.video[0].time_base))
        for packet in source.demux(video=0):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - earlier * step, packet.dts - earlier * step, stream
                container.mux(packet)
    return str(target)


def make(kind: str, folder: Path) -> tuple[str, bool]:
    """A video of 40 frames, and whether its own table serves."""
    plain = folder / "plain.mp4"
    if kind == "fragments":
        return remuxed(write_video(plain, 40, codec="libx264"), folder / "a.mp4", movflags="frag_keyframe+empty_moov"), False
    if kind == "edit list":
        return remuxed(write_video(plain, 45, codec="libx264"), folder / "a.mp4", earlier=5), False
    if kind in ("ts", "mkv"):
        return remuxed(write_video(plain, 40, codec="libx264"), folder / f"a.{kind}"), False
    if kind == "uneven":
        return write_at(folder / "a.mp4", [20 * k + k**2 for k in range(40)], bf="0"), True
    if kind == "uneven, reordered":
        return write_at(folder / "a.mp4", [20 * k + k**2 for k in range(40)], bf="3"), False
    codec = {"open gop": "libx265", "vp9": "libvpx-vp9", "mpeg4": "mpeg4"}.get(kind, "libx264")
    return write_video(folder / ("a.mov" if kind == "mov" else "a.mp4"), 40, codec=codec, gop=8), True


KINDS = ["h264", "mov", "open gop", "vp9", "mpeg4", "uneven", "uneven, reordered", "fragments", "edit list", "ts", "mkv"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_is_used_where_it_tells_all_and_the_frames_are_those_counted_from_the_start(tmp_path, monkeypatch, kind):
    path, tabled = make(kind, tmp_path)
    with av.open(path) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        clock = float(container.streams.video[0].time_base)
        container.seek(0)
        pts = sorted(packet.pts for packet in container.demux(video=0) if packet.size and not packet.is_discard)
    assert len(expected) == len(pts) == 40
    for first in range(0, 37, 3):
        monkeypatch.setattr(av_reader, "index_cache", frame_index.IndexCache())
        video = AvVideo(path)
        assert (video.num_frames, not video.index.exact) == (40, tabled)
        assert video.fps == pytest.approx(39 / ((pts[-1] - pts[0]) * clock), rel=1e-9)
        seconds = times_if_variable((np.array(pts) - pts[0]) * clock)
        assert np.array_equal(video.times, seconds) if kind.startswith("uneven") else video.times is None
        found, end = video.read([first, first + 3], None)
        assert end is None and all(np.array_equal(found[position], expected[position]) for position in (first, first + 3))


def test_a_table_whose_times_are_not_as_assumed_is_found_out(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 40, codec="libx264")
    honest = av_reader.index_from_table

    def shifted(*arguments, **about):
        index = honest(*arguments, **about)
        step = index.pts[1] - index.pts[0]
        return FrameIndex(40, index.pts - 2 * step, index.keys, index.time_base, index.header_rate, exact=False)

    monkeypatch.setattr(av_reader, "index_from_table", shifted)
    video = AvVideo(path)
    found, _ = video.read([26, 29], None)
    assert numbers([found[26], found[29]]) == [26, 29] and video.index.exact


def test_a_clip_by_time_is_the_same_whether_or_not_the_file_was_read_before(tmp_path):
    times = np.array([k + k**2 // 19 for k in range(40)])  # pts in tenths of a second; the dts are 0, 1, 2, ...
    path = str(tmp_path / "a.mp4")
    with av.open(write_video(tmp_path / "even.mp4", 40)) as source, av.open(path, "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        tenth = int(1 / (10 * source.streams.video[0].time_base))
        for packet in source.demux(video=0):
            if packet.size:
                packet.pts, packet.stream = int(times[packet.pts // tenth]) * tenth, stream
                container.mux(packet)
    assert not AvVideo(path).index.exact, "without a table this tests nothing"
    half = [0.5] * 3
    settings = ClipSettings(frames=5, stride=1, fps=3, crop_size=24, train_short_side=[24, 24], test_short_side=24, mean=half, std=half)
    clips = TestClips([Video(path, 0)], settings, views=3, crops=1)
    seconds = (times[-1] / 10 - 4 / 3) / 2 + np.arange(5) / 3
    nearest = np.abs(times / 10 - seconds[:, None]).argmin(axis=1).tolist()
    assert [numbers(clips[1].clip.permute(1, 2, 3, 0)) for _ in range(2)] == [nearest, nearest]


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="counts the bytes that Linux says were read")
def test_one_clip_of_a_large_mp4_file_does_not_read_all_of_it(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (60, 120, 160, 3), dtype=np.uint8)
    path = write_video(tmp_path / "a.mp4", frames, codec="libx264", gop=5)

    def read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = read()
    AvVideo(path).read([40, 42], None)
    assert read() - before < os.path.getsize(path) / 2


def test_the_index_of_a_file_is_kept_until_the_file_changes(tmp_path, monkeypatch):
    built = []
    build = AvVideo._quick_index
    monkeypatch.setattr(AvVideo, "_quick_index", lambda self: built.append(self.path) or build(self))
    path = tmp_path / "a.mkv"
    for frames in (40, 25):  # the second in the place of the first
        write_video(path, frames, codec="libx264")
        for _ in range(2):
            video = AvVideo(str(path))
            found, _ = video.read([frames - 1], None)
            assert video.num_frames == frames and numbers(list(found.values())) == [frames - 1]
    assert len(built) == 2


def test_only_the_files_read_last_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(frame_index, "_CACHED_FRAMES", 50)
    paths = [tmp_path / str(number) for number in range(3)]
    for path in paths:
        path.touch()
    cache, built = frame_index.IndexCache(), []

    def get(number: int) -> None:
        cache.get(str(paths[number]), lambda: built.append(number) or FrameIndex(20, np.empty(0), np.empty((0, 3)), None, None))

    for number in (0, 1, 0, 2, 0, 1):
        get(number)
    assert built == [0, 1, 2, 1]


@pytest.mark.parametrize(
    "ticks, clock, header, expected",
    [
        (40, Fraction(1, 1000), None, 25),
        (5, Fraction(1, 10_000), Fraction(30), 2000),  # the timestamps of a fast camera
        (2, Fraction(1, 90_000), None, 45_000),
        (1, Fraction(1, 2000), Fraction(2000), 2000),
        (1, Fraction(1, 90_000), Fraction(90_000), None),  # counts frames at the clock's rate
        (1, Fraction(1, 90_000), Fraction(25), 25),
        (0, None, Fraction(90_000), None),
        (0, None, Fraction(25), 25),
    ],
)
def test_fast_rates_are_believed_unless_they_are_the_rate_of_the_clock(ticks, clock, header, expected):
    pts = ticks * np.arange(10) if ticks else np.empty(0, np.int64)
    index = FrameIndex(10, pts, np.empty((0, 3), np.int64), clock, header)
    assert index.fps == (None if expected is None else pytest.approx(expected)) and index.times is None


def test_a_rate_varies_when_counting_frames_misses_one_by_a_frame():
    even = np.arange(100) / 30
    assert times_if_variable(even) is None
    assert times_if_variable(np.round(even, 2)) is None  # a coarse clock
    assert times_if_variable(np.delete(even, 50)) is None  # a missing frame
    late = even.copy()
    late[50:] += 1
    assert times_if_variable(late) is late
    for times in (np.array([0.0, 5.0]), np.zeros(5), np.array([0.0, 2.0, 1.0, 9.0])):  # too few, none, and not rising
        assert times_if_variable(times) is None
