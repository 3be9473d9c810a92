"""A manifest changes what is trained on by its bad videos, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from miniatures import miniature
from run_tools import run_script, run_tool
from small_training import SMALL

from atfr.data.datasets.ucf101 import ucf101
from atfr.data.datasets.videolist import videolist
from atfr.data.known_bad import leave_out_bad
from atfr.data.manifest import ListedVideo, Manifest
from atfr.data.video.probe import Probe, file_state, quick_hash

BAD_TRAIN, BAD_TEST = "UCF-101/Archery/v_Archery_g05_c01.avi", "UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi"


def prepared(root: Path, *more: str) -> list[str]:
    """Miniature UCF101 with a bad training and a bad test video, prepared; the overrides of its dataset."""
    job = miniature("ucf101", root)
    (root / BAD_TRAIN).write_bytes(b"")
    (root / BAD_TEST).write_text("no video\n" * 50)
    outcome = run_script("scripts/prepare.py", "dataset=ucf101", f"root={root}", "dataset.num_classes=2", "processes=1", *more)
    assert outcome.code == 0, outcome.err
    return job


def split(root: Path, number: int = 1):
    return ucf101(root=str(root), split=number, num_classes=2)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("known bad") / "ucf101"
    prepared(folder)
    return folder


def names(videos, root):
    return [(os.path.relpath(video.path, root), video.label) for video in videos]


def test_only_the_bad_training_videos_go(root):
    before = split(root)
    after = leave_out_bad(before, "prepared/manifest.csv", decoder="pyav")
    assert [video for video in before.train if not video.path.endswith(BAD_TRAIN)] == list(after.train) and len(after.train) == len(before.train) - 1
    noted = {"file": f"{root}/prepared/manifest.csv", "left_out": 1, "not_in_it": 0}
    assert after == replace(before, train=after.train, notes={**before.notes, "manifest": noted})
    assert any(video.path.endswith(BAD_TEST) for video in after.test) and after.val is after.test


def test_classes_that_lose_all_their_training_videos_are_a_warning(tmp_path):
    for name in "abcd":
        (tmp_path / name).write_text(name)
    (tmp_path / "train.csv").write_text("a,run\nb,run\nc,walk\n")
    (tmp_path / "test.csv").write_text("d,walk\n")
    source = videolist(root=str(tmp_path), train="train.csv", test="test.csv")
    after = {}
    for bad in ("b", "c"):
        manifest = Manifest(tmp_path / "without" / bad, {"dataset": "videolist", "decoder": "pyav"})
        for name in "abc":
            path = str(tmp_path / name)
            probe = Probe(file_state(path), reason="bad") if name == bad else Probe(file_state(path), frames=9, quick_hash=quick_hash(path))
            manifest.add(ListedVideo(name, "", "train", missing=False), probe)
        manifest.finish([ListedVideo(name, "", "train", missing=False) for name in "abc"])
        after[bad] = leave_out_bad(source, f"without/{bad}/manifest.csv", decoder="pyav").warnings
    assert source.warnings == after["b"] == ()
    assert after["c"] == (
        f"{tmp_path}/without/c/manifest.csv: 1 of the 2 classes has no training videos: walk",
        f"{tmp_path}/test.csv: 1 of the 1 test videos are of classes without training videos: walk",
    )


def test_another_split_of_the_same_videos_can_use_it(root):
    after = leave_out_bad(split(root, 2), "prepared/manifest.csv", decoder="pyav")
    assert after.notes["manifest"]["left_out"] == 2 and after.notes["official_split"] == 2  # the bad test video is one for training here


def test_videos_that_it_does_not_have_stay_and_are_counted(root, tmp_path):
    manifest = root / "prepared/manifest.csv"
    kept = [line for line in manifest.read_text().splitlines(keepends=True) if "Archery_g06" not in line]
    (tmp_path / "manifest.csv").write_text("".join(kept))
    after = leave_out_bad(split(root), str(tmp_path / "manifest.csv"), decoder="pyav")
    assert {key: after.notes["manifest"][key] for key in ("left_out", "not_in_it")} == {"left_out": 1, "not_in_it": 1}
    assert any("Archery_g06" in video.path for video in after.train)


@pytest.mark.slow
def test_the_copies_are_the_same_dataset_with_the_same_bad_videos(tmp_path):
    root, output = tmp_path / "root", tmp_path / "copies"
    prepared(root, "encode=true", f"output={output}", "short_side=32")
    before, after = split(root), leave_out_bad(split(output), "prepared/manifest.csv", decoder="pyav")
    assert names(after.train, output) == [item for item in names(before.train, root) if item[0] != BAD_TRAIN]
    assert names(after.test, output) == names(before.test, root) and after.class_names == before.class_names
    assert os.readlink(output / BAD_TEST) == str(root / BAD_TEST) and not after.missing["test"]
    shutil.copy(root / "UCF-101/Archery/v_Archery_g06_c01.avi", root / BAD_TRAIN)  # mended: the link gives way to a copy
    again = run_script("scripts/prepare.py", "dataset=ucf101", f"root={root}", "dataset.num_classes=2", "processes=1", "encode=true", f"output={output}", "short_side=32")
    assert again.code == 0, again.err
    assert not (output / BAD_TRAIN).is_symlink() and (output / BAD_TRAIN).exists()
    assert len(leave_out_bad(split(output), "prepared/manifest.csv", decoder="pyav").train) == len(before.train)


@pytest.mark.slow
def test_a_training_with_it_keeps_the_protocol_and_lists_bad_test_videos(root, tmp_path):
    job = ["dataset=ucf101", f"dataset.root={root}", "dataset.num_classes=2", "dataset.manifest=prepared/manifest.csv", "dataset.clip.views=3", "~experiment"]
    outcome = run_tool("train", *SMALL, *job, f"trainer.output_dir={tmp_path}", "trainer.max_steps=1")
    assert outcome.code == 0, outcome.err
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["failed"] == [str(root / BAD_TEST)] and results["num_videos"] == 3 and results["num_views"] == 3 * 3
    protocol = results["protocol"]
    assert (protocol["dataset"], protocol["official_split"], protocol["views"]) == ("ucf101", 1, 3)
    assert protocol["manifest"]["left_out"] == 1


def manifest_of(root: Path, folder: Path, **changes) -> str:
    """A copy of the manifest with other facts in its first line."""
    first, _, rest = (root / "prepared/manifest.csv").read_text().partition("\n")
    settings = {**json.loads(first.removeprefix("# ")), **changes}
    (folder / "manifest.csv").write_text(f"# {json.dumps(settings)}\n{rest}")
    return str(folder / "manifest.csv")


@pytest.mark.parametrize("changes, message", [
    ({"dataset": "hmdb51"}, "made for dataset 'hmdb51', not 'ucf101'; give the manifest of this dataset, or make a new one"),
    ({"version": 0}, "made for version 0, not 1"),
    ({"decoder": "decord"}, "made for decoder 'decord', not 'pyav'"),
])  # fmt: skip
def test_a_manifest_of_something_else_is_refused(root, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        leave_out_bad(split(root), manifest_of(root, tmp_path, **changes), decoder="pyav")


def test_a_manifest_of_other_files_is_refused(root, tmp_path):
    manifest = str(root / "prepared/manifest.csv")
    for changed in (BAD_TRAIN, "UCF-101/Archery/v_Archery_g06_c01.avi"):  # a bad one and a good one
        copy = tmp_path / Path(changed).stem
        shutil.copytree(root, copy)
        with open(copy / changed, "ab") as file:
            file.write(b"more")
        with pytest.raises(ValueError, match=f"{Path(changed).name} has changed since {manifest} was made"):
            leave_out_bad(split(copy), manifest, decoder="pyav")


def test_what_is_no_manifest_and_one_without_these_videos_are_refused(root, tmp_path):
    (tmp_path / "list.csv").write_text("path,label\na.mp4,x\n")
    with pytest.raises(ValueError, match="list.csv is not a manifest of scripts/prepare.py"):
        leave_out_bad(split(root), str(tmp_path / "list.csv"), decoder="pyav")
    with pytest.raises(FileNotFoundError, match="the manifest nowhere.csv does not exist"):
        leave_out_bad(split(root), "nowhere.csv", decoder="pyav")
    (tmp_path / "a.mp4").touch()
    other = replace(videolist(root=str(tmp_path), train="list.csv", test=None), name="ucf101")
    with pytest.raises(ValueError, match="has none of the 1 training videos"):
        leave_out_bad(other, str(root / "prepared/manifest.csv"), decoder="pyav")
