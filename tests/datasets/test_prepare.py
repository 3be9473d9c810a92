"""Preparing a dataset: what is said of bad files, going on after a kill, and copies that hold the same frames."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import av
import numpy as np
import pytest
import torch
from bad_files import odd, unreadable
from miniatures import miniature
from pool_work import work
from run_tools import ROOT, run_script, run_tool, small_job
from torchvision.transforms.v2.functional import resize
from video_files import damage, lay_down, numbers, write_jpgs, write_video

from atfr.data.datasets.videolist import videolist
from atfr.data.manifest import ListedVideo, Manifest, listed_videos
from atfr.data.prepare import copy_all
from atfr.data.video.decode import read_clip
from atfr.data.video.encode import encode
from atfr.data.video.probe import FileState, Probe, probe
from atfr.data.workers import run_each


def prepare(*arguments: str):
    return run_script("scripts/prepare.py", "processes=1", *arguments)


def rows(folder: Path) -> dict[str, dict[str, str]]:
    with open(folder / "prepared/manifest.csv", newline="", encoding="utf-8") as file:
        return {row["path"]: row for row in csv.DictReader(line for line in file if not line.startswith("#"))}


def command(outcome) -> list[str]:
    """The overrides that the last line says to train with."""
    return shlex.split(outcome.out.splitlines()[-1].removeprefix("to train without bad videos: "))


def all_bytes(root: Path) -> dict[str, str]:
    files = [path for path in root.rglob("*") if path.is_file() and "prepared" not in path.parts and os.access(path, os.R_OK)]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def all_frames(path: Path | str, **options) -> np.ndarray:
    return read_clip(str(path), lambda num_frames, fps: np.arange(num_frames), **options).frames


@pytest.fixture(scope="module")
def broken(small_videos, tmp_path_factory):
    """The small videos with broken, strange and missing ones in both lists: root, reasons and the job's overrides."""
    root = tmp_path_factory.mktemp("broken") / "videos"
    shutil.copytree(small_videos, root)
    reasons, strange = unreadable(root), odd(root)
    for split in ("train", "test"):
        with open(root / f"{split}.csv", "a") as file:
            file.writelines(f"{name},right\n" for name in (*reasons, *strange, "gone.mp4"))
    return root, reasons, ["dataset=videolist", f"dataset.root={root}", "dataset.train=train.csv", "dataset.test=test.csv"]


# ---- the manifest


def test_bad_and_missing_files_are_listed_with_reasons_and_the_good_ones_can_be_trained_on(broken, tmp_path):
    root, reasons, job = broken
    before = all_bytes(root)
    outcome = prepare(*job, f"output={tmp_path}")
    assert outcome.code == 0, outcome.err
    found = rows(tmp_path)
    for name, reason in reasons.items():
        assert reason in found[name]["reason"] and found[name]["status"] == ("missing" if name == "dangling.mp4" else "bad")
        assert (f"bad: {name}: " in outcome.out) == (name != "dangling.mp4")
    assert outcome.out.count("warning: ") == 1 and "of the 16 test videos are also training videos" in outcome.out
    assert found["gone.mp4"]["status"] == "missing" and "2 of the" in outcome.out and "(dangling.mp4, gone.mp4)" in outcome.out
    good = [name for name, row in found.items() if row["status"] == "good"]
    assert len(found) == 12 + len(reasons) + 6 + 1 and len(good) == 12 + 6
    facts = ("label", "split", "frames", "fps", "width", "height", "seconds", "bytes")
    state = os.path.getsize(root / "right 0.mp4")
    assert [found["right 0.mp4"][key] for key in facts] == ["right", "train", "24", "10", "64", "48", "2.400", str(state)]
    assert [found["rotated.mp4"][key] for key in facts[:6]] == ["right", "train+test", "20", "10", "48", "64"]
    assert 0 < int(found["cut off.avi"]["frames"]) < 20
    assert all_bytes(root) == before

    trained = run_tool("train", *small_job(root, tmp_path / "run", *command(outcome), "trainer.max_steps=1", "model=x3d"))
    assert trained.code == 0, trained.err
    bad = len(reasons) - 1  # not the link that leads nowhere
    assert f"14 training, {4 + 6 + bad} validation, {4 + 6 + bad} test videos (the same), 2 classes" in trained.out
    said = f"videolist: {bad} of the {14 + bad} training videos are left out, bad by {tmp_path}/prepared/manifest.csv\n"
    assert trained.out.count(said) == 1
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["num_videos"] == 10 and [Path(path).name for path in results["failed"]] == sorted(reasons.keys() - {"dangling.mp4"})
    protocol = results["protocol"]
    assert protocol["manifest"] == {"file": f"{tmp_path}/prepared/manifest.csv", "left_out": bad, "not_in_it": 0}
    assert protocol["missing"] == {"train": 2, "test": 2} and protocol["videos"] == {"train": 14 + bad, "test": 10 + bad}


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["kinetics400", "something_something_v2", "hmdb51"])
def test_the_copies_of_a_dataset_are_a_root_of_the_same_layout(dataset, tmp_path):
    root, output = tmp_path / "root", tmp_path / "copies"
    job = miniature(dataset, root)
    before = all_bytes(root)
    outcome = prepare(*job, "encode=true", "short_side=32", f"output={output}")
    assert outcome.code == 0, outcome.err
    found = rows(output)
    assert {row["status"] for row in found.values()} == ({"good", "missing"} if dataset == "kinetics400" else {"good"})
    if dataset == "kinetics400":
        assert "https://github.com/cvdfoundation" in outcome.out
    again = prepare(*[part.replace(str(root), str(output)) for part in job], f"output={tmp_path / 'again'}")
    assert again.code == 0, again.err
    assert {(row["path"], row["frames"], row["height"], row["quick_hash"]) for row in rows(tmp_path / "again").values()} == {
        (row["path"], row["frames"], row["height"], row["quick_hash"]) for row in found.values()
    }
    assert {row["height"] for row in found.values()} - {""} == {"32"}
    assert all_bytes(root) == before


def test_damage_between_the_frames_looked_at_is_found(tmp_path):
    path = damage(write_video(tmp_path / "a.mp4", 60, codec="libx264", gop=12), packet=20)
    assert "packet 21 of 60 cannot be decoded" in probe(path).reason


def test_nothing_usable_is_an_error(tmp_path):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "list.csv").write_text("a.mp4,x\n")
    outcome = prepare("dataset=videolist", f"root={tmp_path}", "dataset.train=list.csv", "dataset.test=null")
    assert outcome.code == 1 and "none of its 1 videos can be read" in outcome.err and outcome.err.count("\n") <= 3
    assert rows(tmp_path)["a.mp4"]["reason"] == "the file is empty (0 bytes)"


@pytest.mark.parametrize(
    "option, message",
    [("encode=true", "add output=DIR"), ("short_side=1", "short_side is 1"), ("keyframe=x", "keyframe"), ("+size=3", "size")],
)
def test_an_option_that_makes_no_sense_is_named(broken, option, message):
    outcome = prepare(*broken[2], option)
    assert outcome.code == 1 and message in outcome.err and "Traceback" not in outcome.err


def test_each_video_is_listed_once_with_the_splits_that_name_it(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.mp4", "#b.mp4", "sub/c.mp4"):
        (tmp_path / name).touch()
    lists = {"train": "a.mp4,x\nsub/c.mp4,y\n", "val": "./#b.mp4,x\n", "test": "./#b.mp4,x\nsub/c.mp4,y\ngone.mp4,x\n"}
    for split, text in lists.items():
        (tmp_path / f"{split}.csv").write_text(text)
    source = videolist(root=str(tmp_path), **{split: f"{split}.csv" for split in lists}, allow_missing=True)
    found = [(video.path, video.label, video.split, video.missing) for video in listed_videos(source, str(tmp_path))]
    assert found == [
        ("a.mp4", "x", "train", False),
        ("sub/c.mp4", "y", "train+test", False),
        ("./#b.mp4", "x", "val+test", False),
        ("gone.mp4", "", "test", True),
    ]


# ---- going on


def test_a_run_that_was_cut_off_goes_on_with_what_is_new_or_changed(tmp_path):
    names = [f"{i}.mp4" for i in range(4)]
    videos = [ListedVideo(name, "x", "train", missing=False) for name in names]
    state = FileState(10, 20)
    settings = {"decoder": "pyav"}
    manifest = Manifest(tmp_path, settings)
    for video in videos[:3]:
        manifest.add(video, Probe(state, 5, 2.5, 6, 4, "ab", ""))
    manifest.close()
    unfinished = tmp_path / "unfinished.csv"
    unfinished.write_bytes(unfinished.read_bytes()[:-4])  # a kill in the middle of a row
    again = Manifest(tmp_path, settings)
    assert [again.knows(name, state) for name in names] == [True, True, False, False]
    assert not again.knows("0.mp4", FileState(11, 20)) and not again.knows("0.mp4", FileState(10, 21))
    assert not Manifest(tmp_path, {"decoder": "decord"}).knows("0.mp4", state)
    again.add(videos[2], Probe(state, 5, 2.5, 6, 4, "ab", ""))
    again.add(videos[3], Probe(state, reason="no, \"it\" cannot"))
    again.finish(videos)
    lines = (tmp_path / "manifest.csv").read_text().splitlines()
    assert lines[2] == "0.mp4,x,train,5,2.5,6,4,2.000,10,20,ab,good," and lines[5] == '3.mp4,x,train,,,,,,10,20,,bad,"no, ""it"" cannot"'
    assert not unfinished.exists()
    assert [Manifest(tmp_path, settings).knows(name, state) for name in names] == [True, True, True, False]  # bad: looked at again


@pytest.mark.parametrize("number,code,said", [pytest.param(signal.SIGKILL, -9, "", marks=pytest.mark.slow), (signal.SIGINT, 130, "stopped by SIGINT; run the same command again to continue\n")])
def test_a_run_that_is_killed_or_ended_by_ctrl_c_goes_on_where_it_stopped(tmp_path, number, code, said):
    root, output = tmp_path / "root", tmp_path / "copies"
    root.mkdir()
    first = write_video(root / "0.mp4", 30, codec="libx264", size=(192, 128))
    for i in range(1, 24):
        shutil.copy(first, root / f"{i}.mp4")
    (root / "list.csv").write_text("".join(f"{i}.mp4,x\n" for i in range(24)))
    job = ["dataset=videolist", f"dataset.root={root}", "dataset.train=list.csv", "dataset.test=null", "encode=true", f"output={output}"]
    command = [sys.executable, str(ROOT / "scripts/prepare.py"), *job, "processes=1"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True
    )
    began = time.monotonic()
    while len(list(output.glob("*.mp4"))) < 1 and time.monotonic() - began < 60:
        time.sleep(0.01)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: its worker, too
    else:
        process.send_signal(number)
    assert (process.communicate()[1], process.returncode) == (said, code)
    time.sleep(0.3)  # until its worker has noticed
    done = {path.name: path.stat().st_ino for path in output.glob("*.mp4")}
    assert 1 <= len(done) < 24 and not (output / "prepared/manifest.csv").exists()
    outcome = prepare(*job)
    assert outcome.code == 0, outcome.err
    assert {name: (output / name).stat().st_ino for name in done} == done  # written anew they would be other files
    assert [row["frames"] for row in rows(output).values()] == ["30"] * 24 and not list(output.glob(".*.tmp"))


# ---- copies


@pytest.mark.parametrize("name, codec", [("a.avi", "mpeg4"), ("a.webm", "libvpx-vp9"), ("a.mp4", "libx264")])
def test_a_copy_has_the_same_frames_at_the_same_rate_and_nearly_the_same_pixels(tmp_path, name, codec):
    rng = np.random.default_rng(0)
    pixels = np.repeat(np.repeat(rng.integers(0, 255, (1, 6, 8, 3), dtype=np.uint8), 16, axis=1), 16, axis=2)
    source = write_video(tmp_path / name, np.concatenate([np.roll(pixels, 4 * t, axis=2) for t in range(20)]), codec=codec, gop=100)
    target = tmp_path / "copies" / name
    target.parent.mkdir()
    encode(source, target, short_side=48, keyframe=5)
    ours, theirs = all_frames(target), all_frames(source, short_side=48)
    assert ours.shape == theirs.shape == (20, 48, 64, 3)
    assert np.abs(ours.astype(int) - theirs).mean() < 6
    differences = np.abs(ours[:, None].astype(int) - theirs[None]).mean((2, 3, 4))
    assert differences.argmin(axis=1).tolist() == list(range(20))
    with av.open(str(target)) as container:
        assert container.streams.video[0].codec_context.name == "h264" and not container.streams.audio
        keys = [number for number, packet in enumerate(p for p in container.demux(video=0) if p.size) if packet.is_keyframe]
        assert max(np.diff([*keys, 20])) <= 5
    assert probe(str(target)).fps == pytest.approx(10)


def test_a_copy_is_upright_never_enlarged_and_of_even_size(tmp_path):
    sizes = {}
    lay_down(write_video(tmp_path / "rotated.mp4", 8, codec="libx264"))
    write_video(tmp_path / "odd.avi", 8, size=(61, 47))
    for name in ("rotated.mp4", "odd.avi"):
        encode(str(tmp_path / name), tmp_path / f"copy {name}", short_side=256, keyframe=12)
        frames = all_frames(tmp_path / f"copy {name}")
        sizes[name] = frames.shape
        assert numbers(frames) == list(range(8))
        if name == "rotated.mp4":
            assert np.abs(frames.astype(int) - all_frames(tmp_path / name)).mean() < 4
    assert sizes == {"rotated.mp4": (8, 64, 48, 3), "odd.avi": (8, 46, 60, 3)}


def test_uneven_times_are_kept(tmp_path):
    times = [3, 4, 6, 9, 13, 20, 21, 22]  # tenths of a second
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height = stream.width = 64
        for i, pts in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 * i, np.uint8), format="rgb24")
            frame.pts = pts
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    encode(str(tmp_path / "a.mkv"), tmp_path / "a.mp4", short_side=64, keyframe=12)
    with av.open(str(tmp_path / "a.mp4")) as container:
        seconds = [float(frame.pts * frame.time_base) for frame in container.decode(video=0)]
    assert seconds == pytest.approx([(pts - 3) / 10 for pts in times], abs=1e-3)


def test_copies_never_take_the_place_of_other_files(tmp_path):
    root, output = tmp_path / "root", tmp_path / "output"
    root.mkdir(), output.mkdir()
    source = write_video(root / "a.mp4", 8, codec="libx264")
    write_jpgs(root / "frames", all_frames(source))
    videos = [ListedVideo(path, "x", "train", missing=False) for path in ("a.mp4", "frames", f"{tmp_path}/outside.mp4")]
    before = Path(source).read_bytes()
    options = {"root": root, "keyframe": 12, "processes": 1, "timeout_s": 60}
    with pytest.raises(ValueError, match="a.mp4 exists and is not a copy"):
        copy_all(videos, output=root, short_side=32, **options)
    assert copy_all(videos, output=output, short_side=32, **options) == {}
    assert os.readlink(output / "frames") == str(root / "frames") and sorted(path.name for path in output.iterdir()) == ["a.mp4", "frames", "prepared"]
    with pytest.raises(ValueError, match="were made with .*32.*, not .*48.*; give another output"):
        copy_all(videos, output=output, short_side=48, **options)
    (output / "a.mp4").unlink()
    (output / "a.mp4").symlink_to(source)
    os.utime(source, ns=(0, 0))
    assert Path(source).read_bytes() == before
    with pytest.raises(Exception, match="would be the file itself"):
        encode(source, output / "a.mp4", short_side=32, keyframe=12)


def test_copies_of_real_clips_hold_as_many_frames(test_data, tmp_path):
    names = ("hmdb51/wave/TrumanShow_wave_f_nm_np1_fr_med_26.avi", "something_something_v2/Closing something/closing_2.webm", "bad_inputs/rotated_90.mov")
    for name in names:
        source, target = test_data / "videos" / name, tmp_path / Path(name).name
        encode(str(source), target, short_side=96, keyframe=12)
        original, copy = probe(str(source)), probe(str(target))
        assert copy.frames == original.frames and copy.fps == pytest.approx(original.fps, rel=1e-3), name
        ours = all_frames(target)
        theirs = torch.from_numpy(all_frames(source)[: copy.frames].copy()).permute(0, 3, 1, 2)  # a missing last frame is repeated
        theirs = resize(theirs, list(ours.shape[1:3]), antialias=True).permute(0, 2, 3, 1).numpy()
        assert len(ours) == copy.frames and np.abs(ours.astype(int) - theirs).mean() < 5, name


# ---- the processes


def test_files_that_crash_or_wedge_a_process_have_a_reason_and_the_others_a_result():
    items = ["a", "crash", "b", "hang", "slow", "wrong", "c"]
    found = {item: (result, reason) for item, result, reason in run_each(work, items, processes=2, timeout_s=0.5)}
    assert found == {
        "a": ("A", ""), "b": ("B", ""), "c": ("C", ""), "slow": ("SLOW", ""),
        "crash": (None, "its process ended unexpectedly (exit code 3)"),
        "hang": (None, "no answer within 0.5 s: its decoder or its disk hangs, or timeout_s is too short"),
        "wrong": (None, "in two lines"),
    }  # fmt: skip


def test_the_processes_do_not_run_the_program_again(tmp_path, monkeypatch):
    """Which takes seconds in each, and memory."""
    program = ModuleType("__main__")
    program.__file__ = str(tmp_path / "program.py")
    (tmp_path / "program.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setitem(sys.modules, "__main__", program)
    assert [outcome.result for outcome in run_each(work, ["a"], processes=1, timeout_s=30)] == ["A"]
    assert not (tmp_path / "ran").exists() and sys.modules["__main__"] is program
