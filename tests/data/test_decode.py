"""Reading clips: the right frames come out of every kind of file, and bad files end in one clear error."""

import csv
import os
import pickle
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from video_files import damage, numbers, write_at, write_sound, write_video

from atfr.data.types import VideoError
from atfr.data.video import av_reader, decode, frame_index
from atfr.data.video.av_reader import AvVideo
from atfr.data.video.readers import Unsupported

FORMATS = {
    "h264_mp4": ("libx264", "mp4"),
    "h264_mkv": ("libx264", "mkv"),
    "mpeg4_avi": ("mpeg4", "avi"),
    "hevc_mp4": ("libx265", "mp4"),
    "vp9_webm": ("libvpx-vp9", "webm"),
    "av1_mp4": ("libsvtav1", "mp4"),
}
DATA = os.environ.get("ATFR_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="ATFR_TEST_DATA does not point to the folder of real videos")


def read_clip(*arguments, **options):
    return decode.read_clip(*arguments, **options).frames


def need(decoder):
    """Skip the test where the library of a decoder is missing: another one would read in its place."""
    pytest.importorskip({"pyav": "av"}.get(decoder, decoder))


def chosen(*indices):
    return lambda num_frames, fps: np.array(indices)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_frames_asked_for_come_out_in_that_order_from_every_format(tmp_path, kind):
    codec, ending = FORMATS[kind]
    path = write_video(tmp_path / f"video.{ending}", 40, codec=codec)
    seen = []
    clip = read_clip(path, lambda num_frames, fps: seen.append(num_frames) or np.array([31, 5, 5, 0, 39, 17]))
    assert seen == [40]
    assert clip.shape == (6, 48, 64, 3) and clip.dtype == np.uint8
    assert numbers(clip) == [31, 5, 5, 0, 39, 17]


@pytest.mark.parametrize("kind", ["h264_mp4", "mpeg4_avi", "vp9_webm"])
def test_seeking_finds_the_same_frames_as_counting_from_the_start(tmp_path, kind):
    codec, ending = FORMATS[kind]
    path = write_video(tmp_path / f"video.{ending}", 40, codec=codec, gop=12)
    video = AvVideo(path)
    starts = video.index.keys[:, 0].tolist()
    assert len(starts) > 1, "without several keyframes this tests nothing"
    for first in range(0, 36, 3):
        before = video.index.keyframe_before(first)
        sought, end = video._collect([(before, [first, first + 2])], None)
        assert end is None and numbers([sought[first], sought[first + 2]]) == [first, first + 2]


def counted(monkeypatch):
    """A list that grows with every frame decoded by PyAV."""
    decoded, decode_all = [], AvVideo._decode

    def count(self, *arguments, **options):
        for frame in decode_all(self, *arguments, **options):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(AvVideo, "_decode", count)
    return decoded


@pytest.mark.parametrize("kind, gop", [("h264_mp4", 5), ("h264_mkv", 8), ("hevc_mp4", 8), ("vp9_webm", 9), ("mpeg4_avi", 8)])
def test_seeking_from_keyframe_to_keyframe_finds_the_same_frames_and_decodes_fewer(tmp_path, monkeypatch, kind, gop):
    codec, ending = FORMATS[kind]
    video = AvVideo(write_video(tmp_path / f"video.{ending}", 60, codec=codec, gop=gop))
    decoded, rng = counted(monkeypatch), np.random.default_rng(0)
    sought = through = 0
    for size in (2, 3, 4, 6, 12) * 4:
        wanted = sorted(rng.choice(60, size, replace=False).tolist())
        for seek in (True, False):
            decoded.clear()
            frames, end = video.read(wanted, None, seek=seek)
            assert end is None and sorted(frames) == wanted and numbers(np.stack([frames[i] for i in wanted])) == wanted
            sought, through = sought + seek * len(decoded), through + (not seek) * len(decoded)
    assert sought < 0.8 * through


def test_a_clip_whose_frames_lie_close_is_decoded_in_one_go(tmp_path, monkeypatch):
    video = AvVideo(write_video(tmp_path / "video.mp4", 40, codec="libx264", gop=12))
    decoded = counted(monkeypatch)
    video.read([0, 3, 6, 9, 12, 15], None)
    assert len(decoded) == 16
    decoded.clear()
    video.read([0, 3, 30, 33], None)
    before = video.index.keyframe_before(30).position
    assert len(decoded) == 4 + (33 - before + 1) < 34


@pytest.mark.parametrize("kind, first, times", [("h264_mp4", 0, 1), ("h264_mp4", 25, 1), ("vp9_webm", 30, 1), ("packed", 25, 2)])
def test_a_file_known_by_its_timestamps_is_opened_once_for_a_clip(tmp_path, monkeypatch, kind, first, times):
    codec, ending = FORMATS["mpeg4_avi" if kind == "packed" else kind]
    path = write_video(tmp_path / f"video.{ending}", 40, codec=codec)
    if kind == "packed":  # then it is counted from its start
        monkeypatch.setattr(frame_index, "_PLACEHOLDER_BYTES", 10**6)
    opened, open_file = [], av.open
    monkeypatch.setattr(av, "open", lambda *arguments, **options: opened.append(path) or open_file(*arguments, **options))
    assert numbers(read_clip(path, chosen(first, first + 3))) == [first, first + 3]
    assert len(opened) == times


@pytest.mark.parametrize("kind", ["mpeg4_avi", "h264_mp4", "h264_mkv"])
def test_a_title_that_is_not_utf8_does_not_keep_a_file_from_being_read(tmp_path, kind):
    codec, ending = FORMATS[kind]
    path = Path(write_video(tmp_path / f"video.{ending}", 20, codec=codec, title="Cafe in Munchen"))
    content = path.read_bytes()
    assert b"Cafe in Munchen" in content
    path.write_bytes(content.replace(b"Cafe in Munchen", "Café in München".encode("latin-1")))
    assert numbers(read_clip(str(path), chosen(0, 7, 19))) == [0, 7, 19]
    assert AvVideo(str(path)).fps == pytest.approx(10)


def test_a_rate_that_is_not_known_is_none_however_the_library_says_so():
    assert av_reader._fraction(None) is None
    assert av_reader._fraction(Fraction(0, 1)) is None  # PyAV 19
    assert av_reader._fraction(SimpleNamespace(numerator=30000, denominator=1001)) == Fraction(30000, 1001)


def test_a_file_that_cannot_be_sought_in_is_counted_from_its_start(tmp_path, monkeypatch):
    path = write_video(tmp_path / "video.mp4", 40, codec="libx264")
    refused, open_file = [], AvVideo._open

    def refuse(*_, **__):
        refused.append(True)
        raise av.error.PermissionError(1, "Operation not permitted")

    @contextmanager
    def unseekable(self, **options):
        with open_file(self, **options) as (container, stream):
            yield SimpleNamespace(demux=container.demux, format=container.format, size=container.size, seek=refuse), stream

    monkeypatch.setattr(AvVideo, "_open", unseekable)
    assert numbers(read_clip(path, chosen(25, 31))) == [25, 31] and refused


def test_frames_are_scaled_to_the_short_side_and_never_enlarged(tmp_path):
    wide = write_video(tmp_path / "wide.mp4", 3, codec="libx264", size=(130, 50))
    tall = write_video(tmp_path / "tall.mp4", 3, codec="libx264", size=(50, 130))
    assert read_clip(wide, chosen(0, 2), short_side=25).shape == (2, 25, 65, 3)
    assert read_clip(tall, chosen(0, 2), short_side=25).shape == (2, 65, 25, 3)
    assert read_clip(wide, chosen(0), short_side=64).shape == (1, 50, 130, 3)
    assert numbers(read_clip(wide, chosen(0, 2), short_side=25)) == [0, 2]


def test_a_video_of_one_frame_can_fill_a_clip(tmp_path):
    path = write_video(tmp_path / "one.mp4", 1, codec="libx264")
    assert numbers(read_clip(path, lambda num_frames, fps: np.zeros(4, int) + num_frames - 1)) == [0, 0, 0, 0]


def promise(monkeypatch, extra):
    """Makes files promise `extra` frames more than they hold."""
    honest = AvVideo._use

    def boast(self, index):
        honest(self, index)
        self.num_frames += extra

    monkeypatch.setattr(AvVideo, "_use", boast)


def test_a_few_missing_frames_at_the_end_are_replaced_by_the_last_one(tmp_path, monkeypatch):
    path = write_video(tmp_path / "video.avi", 20)
    promise(monkeypatch, 3)
    assert numbers(read_clip(path, lambda num_frames, fps: np.array([0, num_frames - 4, num_frames - 1]))) == [0, 19, 19]


def test_when_many_frames_are_missing_the_clip_is_chosen_again(tmp_path, monkeypatch):
    path = write_video(tmp_path / "video.avi", 20)
    promise(monkeypatch, 30)
    asked = []
    clip = read_clip(path, lambda num_frames, fps: asked.append(num_frames) or np.array([num_frames // 2, num_frames - 1]))
    assert asked == [50, 20]
    assert numbers(clip) == [10, 19]


def test_a_damaged_packet_in_the_middle_is_an_error_and_one_at_the_end_is_the_end(tmp_path):
    middle = damage(write_video(tmp_path / "middle.mp4", 40, codec="libx264"), packet=20)
    with pytest.raises(VideoError, match=r"packet 21 of 40 cannot be decoded"):
        read_clip(middle, chosen(0, 39), seek=False)
    assert numbers(read_clip(middle, chosen(0, 39))) == [0, 39]  # what is not wanted need not be whole
    end = damage(write_video(tmp_path / "end.mp4", 40, codec="libx264"), packet=38)
    clip = numbers(read_clip(end, chosen(0, 20, 39)))
    assert clip[:2] == [0, 20] and 30 <= clip[2] < 39


def bad_files(folder):
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("this is no video\n" * 50)
    (folder / "folder.mp4").mkdir()
    whole = write_video(folder / "whole.mp4", 20, codec="libx264")
    # An mp4 file has its table of contents at the end, so an interrupted download cannot be opened.
    (folder / "cut.mp4").write_bytes(Path(whole).read_bytes()[:5000])
    write_sound(folder / "sound.mp4")
    return {
        "empty.mp4": "the file is empty (0 bytes)",
        "text.mp4": "Invalid data found",
        "folder.mp4": "it is a folder without jpg, png, bmp or webp files",
        "cut.mp4": "Invalid data found",
        "sound.mp4": "it has no video stream",
        "nowhere.mp4": "No such file or directory",
    }


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_each_bad_file_ends_in_one_line_with_its_path_and_the_reason(tmp_path, decoder, capfd):
    need(decoder)
    for name, reason in bad_files(tmp_path).items():
        path = str(tmp_path / name)
        with pytest.raises(VideoError) as caught:
            read_clip(path, chosen(0), decoder=decoder)
        assert caught.value.path == path
        assert reason in caught.value.reason, name
        assert str(caught.value).startswith(f"cannot read {path}: ") and "\n" not in str(caught.value)
    if decoder == "pyav":  # decord prints to stderr whatever its log level
        assert capfd.readouterr().err == ""


def test_an_error_survives_pickling_and_a_workers_traceback():
    error = VideoError("/data/a b.mp4", "it has no video stream")
    for copy in (pickle.loads(pickle.dumps(error)), VideoError(f"Traceback:\n  line 1\nVideoError: {error}\n")):
        assert (copy.path, copy.reason) == (error.path, error.reason)


def test_a_pick_outside_the_video_is_refused(tmp_path):
    path = write_video(tmp_path / "video.avi", 5)
    with pytest.raises(ValueError, match=r"pick\(5\) returned \[5\]"):
        read_clip(path, chosen(5))


def test_an_unknown_decoder_is_refused():
    with pytest.raises(ValueError, match="decoder is 'opencv'"):
        read_clip("a.mp4", chosen(0), decoder="opencv")


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize("kind", ["h264_mp4", "mpeg4_avi", "vp9_webm"])
def test_the_rate_of_a_file_is_known_to_whoever_picks(tmp_path, kind, decoder):
    need(decoder)
    codec, ending = FORMATS[kind]
    rates = []
    clip = decode.read_clip(write_video(tmp_path / f"video.{ending}", 20, codec=codec), lambda _, fps: rates.append(fps) or [0], decoder=decoder)
    assert clip.decoder == decoder and rates == [pytest.approx(10, rel=0.01)]


@pytest.mark.parametrize("kind", ["h264_mp4", "mpeg4_avi"])
def test_decord_reads_the_same_frames(tmp_path, kind):
    pytest.importorskip("decord")
    codec, ending = FORMATS[kind]
    path = write_video(tmp_path / f"video.{ending}", 40, codec=codec)
    for short_side, shape in ((None, (3, 48, 64, 3)), (24, (3, 24, 32, 3))):
        clip = decode.read_clip(path, chosen(30, 2, 39), decoder="decord", short_side=short_side)
        assert clip.decoder == "decord" and clip.frames.shape == shape and numbers(clip.frames) == [30, 2, 39]


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize("ending, codec", [("ts", "libx264"), ("m2ts", "libx264"), ("mpg", "mpeg2video"), ("ts", "mpeg2video")])
def test_frames_of_mpeg_streams_are_counted_from_the_first(tmp_path, ending, codec, decoder):
    need(decoder)
    path = write_video(tmp_path / f"video.{ending}", 40, codec=codec, gop=10, rate=25)
    clip = decode.read_clip(path, chosen(0, 9, 10, 25, 39), decoder=decoder)
    assert numbers(clip.frames) == [0, 9, 10, 25, 39]
    assert clip.decoder == (decoder if ending == "mpg" else "pyav")  # decord is not asked for transport streams


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_frames_are_picked_by_time_where_the_rate_varies_and_that_is_asked_for(tmp_path, decoder):
    need(decoder)
    times = [100 * k for k in range(10)] + [1000 + 1000 * k for k in range(10)]
    uneven = write_at(tmp_path / "uneven.mp4", times)
    seen = []

    def by_time(given):
        seen.append(given)
        return np.array([12, 3])

    clip = decode.read_clip(uneven, chosen(5), pick_by_time=by_time, decoder=decoder)
    assert clip.decoder == decoder and numbers(clip.frames) == [12, 3]
    assert seen[0] == pytest.approx([time / 1000 for time in times], abs=1e-4)
    assert numbers(read_clip(uneven, chosen(5), decoder=decoder)) == [5]
    for name, codec in (("even.mp4", "libx264"), ("even.avi", "mpeg4"), ("even.mpg", "mpeg2video")):
        even = write_video(tmp_path / name, 20, codec=codec, rate=25)
        assert numbers(read_clip(even, chosen(5), pick_by_time=by_time, decoder=decoder)) == [5], name
    assert len(seen) == 1


def test_decord_steps_in_where_pyav_has_no_decoder(tmp_path, monkeypatch):
    pytest.importorskip("decord")
    path = write_video(tmp_path / "video.mp4", 10, codec="libx264")

    class NoDecoder:
        def __init__(self, path):
            raise Unsupported(path, "PyAV has no decoder for it")

    monkeypatch.setattr(decode, "AvVideo", NoDecoder)
    assert numbers(read_clip(path, chosen(7))) == [7]
    monkeypatch.setattr(decode, "DecordVideo", NoDecoder)
    with pytest.raises(VideoError, match="PyAV has no decoder"):
        read_clip(path, chosen(7))


def test_pyav_steps_in_where_decord_cannot_read_a_file(tmp_path, monkeypatch):
    path = write_video(tmp_path / "video.mp4", 10, codec="libx264")

    class Confused:
        def __init__(self, path):
            raise VideoError(path, "decord: something of its own")

    monkeypatch.setattr(decode, "DecordVideo", Confused)
    assert numbers(read_clip(path, chosen(7), decoder="decord")) == [7]


@needs_data
def test_real_files_have_as_many_frames_as_a_full_decode_found():
    folder = os.path.join(DATA, "videos")
    with open(os.path.join(folder, "decode_stats.csv")) as stream:
        rows = list(csv.DictReader(stream))
    quirky = ("bad_inputs", "hmdb51", "something")
    for row in [row for row in rows if row["relative_path"].startswith(quirky)] + rows[::25]:
        path = os.path.join(folder, row["relative_path"])
        if "corrupted" in path:
            with pytest.raises(VideoError, match="packet 31 of 50"):
                read_clip(path, chosen(0, 49))
            continue
        video = AvVideo(path)
        _, end = video.read([video.num_frames - 1], 32)
        assert (end or video.num_frames) == int(row["frames_decoded"]), row["relative_path"]
        assert video.fps == pytest.approx(float(row["avg_fps"]), rel=0.05), row["relative_path"]


@needs_data
@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_seeking_in_real_files_finds_the_frames_that_decoding_all_of_them_does(monkeypatch, number):
    decoded, rng = counted(monkeypatch), np.random.default_rng(0)
    sets = ("kinetics400", "something", "ucf101", "hmdb51", "tennis", "stock", "hd_phone")
    with open(os.path.join(DATA, "videos", "decode_stats.csv")) as stream:
        paths = [row["relative_path"] for row in csv.DictReader(stream)]
    fewer = 0
    for path in [[path for path in paths if path.startswith(name)][number] for name in sets]:
        video = AvVideo(os.path.join(DATA, "videos", path))
        wanted = sorted(set(rng.integers(0, video.num_frames - 2, 6).tolist()))
        decoded.clear()
        sought, _ = video.read(wanted, 64)
        count = len(decoded)
        through, _ = video.read(wanted, 64, seek=False)
        fewer += count < len(decoded) - count
        assert all(np.array_equal(sought[i], through[i]) for i in wanted), path
    assert fewer >= 2


@needs_data
def test_a_rotated_phone_video_comes_out_upright_and_as_decord_has_it():
    pytest.importorskip("decord")
    path = os.path.join(DATA, "videos", "bad_inputs", "rotated_90.mov")
    upright = read_clip(path, chosen(0, 2))
    assert upright.shape == (2, 568, 320, 3)
    other = decode.read_clip(path, chosen(0, 2), decoder="decord")
    assert other.decoder == "decord" and np.abs(upright.astype(int) - other.frames).max() <= 2
    assert read_clip(path, chosen(0), short_side=80).shape == (1, 142, 80, 3)
