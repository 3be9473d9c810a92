"""A dataset in which files are broken in every usual way: training goes on without them, testing lists them."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import time
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bad_files import odd, unreadable
from run_tools import run_tool, small_job
from video_files import lie_about_duration, write_jpgs, write_video

from atfr.data.clips import ClipSettings, TestClips, TrainClips
from atfr.data.loader import TrainSampler, test_loader, train_loader
from atfr.data.transforms import Normalizer
from atfr.data.types import Unreadable, Video, VideoError
from atfr.data.video import decode
from atfr.data.video.decode import read_clip
from atfr.engine.distributed.comm import DistInfo
from atfr.engine.evaluator import evaluate
from atfr.engine.metrics import summarise

GRAY = [0.5, 0.5, 0.5]
CLIP = ClipSettings(frames=8, stride=2, crop_size=32, train_short_side=[32, 40], test_short_side=32, mean=GRAY, std=GRAY)


@pytest.fixture(scope="module")
def miniature(small_videos, tmp_path_factory):
    """The small videos, with broken and strange ones in both lists; the root, and the names of those broken."""
    root = tmp_path_factory.mktemp("miniature") / "videos"
    shutil.copytree(small_videos, root)
    broken, strange = unreadable(root), odd(root)
    del broken["dangling.mp4"]  # a list that names a missing file is refused
    for split in ("train", "test"):
        with open(root / f"{split}.csv", "a") as file:
            file.writelines(f"{name},right\n" for name in (*broken, *strange))
    return root, sorted(broken)


@contextmanager
def as_somebody_else():
    """Root may read everything, so for a while this is not root."""
    if os.getuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if os.getuid() == 0:
            os.seteuid(0)


def test_what_one_may_not_read_is_refused_with_that_reason(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # and relative paths, since the folders above are not for everybody
    tmp_path.chmod(0o755)
    pictures = np.zeros((3, 48, 64, 3), dtype=np.uint8)
    reasons = {
        write_video(tmp_path / "video.mp4", 20, codec="libx264"): "Permission denied",
        write_jpgs(tmp_path / "folder", pictures): "Permission denied",
        write_jpgs(tmp_path / "one frame", pictures): "frame img_2.jpg: Permission denied",
    }
    for name in ("video.mp4", "folder", "one frame/img_2.jpg"):
        os.chmod(name, 0)
    with as_somebody_else():
        for path, reason in reasons.items():
            name = os.path.basename(path)
            with pytest.raises(VideoError, match=f"cannot read {name}: {reason}$"):
                read_clip(name, lambda num_frames, fps: [0, 1])
    os.chmod("folder", 0o755)  # pytest cleans up


def test_strange_files_are_read_upright_and_at_their_size(tmp_path):
    for name, (height, width) in odd(tmp_path).items():
        clip = read_clip(str(tmp_path / name), lambda num_frames, fps: [0, num_frames - 1]).frames
        assert clip.shape == (2, height, width, 3), name


def test_a_header_that_lies_about_the_duration_changes_neither_frames_nor_rate(tmp_path):
    seen = []
    for name, factor in (("honest.mp4", 1), ("long.mp4", 50)):
        path = lie_about_duration(write_video(tmp_path / name, 20, codec="libx264"), factor)
        read_clip(path, lambda num_frames, fps: seen.append((num_frames, fps)) or [0])
    assert seen == [(20, 10.0), (20, 10.0)]


@pytest.mark.parametrize("split", ["train", "test"])
def test_bad_files_are_replaced_or_listed_alike_for_any_number_of_workers(tmp_path, split):
    good = [Video(write_video(tmp_path / f"good {i}.mp4", 20 + i, codec="libx264"), 0) for i in range(8)]
    reasons = unreadable(tmp_path)
    videos = [*good, *(Video(str(tmp_path / name), 1) for name in reasons)]

    def batches(workers):
        if split == "test":
            return list(test_loader(TestClips(videos, CLIP, views=2, crops=1), batch_size=4, workers=workers, timeout_s=60))
        sampler = TrainSampler(len(videos), seed=0, global_batch=len(videos))
        return list(train_loader(TrainClips(videos, CLIP, seed=0), sampler=sampler, workers=workers, timeout_s=60))

    alone = batches(0)
    for workers in (1, 2):
        for one, other in zip(alone, batches(workers), strict=True):
            assert (one.paths, one.bad, one.failed) == (other.paths, other.bad, other.failed)
            assert torch.equal(one.labels, other.labels)
            assert one.clips is other.clips is None or torch.equal(one.clips, other.clips)
    if split == "train":
        assert len(alone[0]) == len(videos) and set(alone[0].labels.tolist()) == {0}
        told = "\n".join(alone[0].bad)
        assert all(f"cannot read {tmp_path / name}: " in told and reason in told for name, reason in reasons.items())
    else:
        assert [path for batch in alone for path in batch.paths] == [video.path for video in good for _ in range(2)]
        failed = [video for batch in alone for video in batch.failed]
        assert Counter(video.path for video in failed) == {str(tmp_path / name): 2 for name in reasons}
        assert all(reasons[os.path.basename(video.path)] in video.reason for video in failed)


def test_training_and_testing_complete_on_a_dataset_with_bad_files(miniature, tmp_path, caplog):
    root, broken = miniature
    outcome = run_tool("train", *small_job(root, tmp_path, "model=x3d", "trainer.workers=1", "trainer.batch_size=19"))
    assert outcome.code == 0, outcome.err
    results = json.loads((tmp_path / "results.json").read_text())
    assert sorted(os.path.basename(path) for path in results["failed"]) == broken
    assert results["num_videos"] == 4 + 6 and results["num_views"] == 2 * results["num_videos"]
    assert results["protocol"]["decoders"] == {"pyav": 10}
    assert f"10 ({len(broken)} more could not be read)" in outcome.out
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # An epoch is one batch of all videos; a stand-in may be bad, too.
    assert all(line["replaced"] >= len(broken) for line in lines if line["split"] == "train")
    assert all("mean_class_accuracy" in line for line in lines if line["split"] == "val")
    named = Counter(message.split(": ")[1] for message in (caplog.text + outcome.out).splitlines() if "replaced in training" in message)
    assert named.keys() == {f"cannot read {root / name}" for name in broken} and set(named.values()) == {1}


class Constant(torch.nn.Module):
    """A network that gives all clips the same scores."""

    def forward(self, clips, return_sampling):
        return torch.ones(len(clips), 2), SimpleNamespace(bins=[(4,)] * len(clips), frames=(8,))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_file_that_is_listed_several_times_counts_as_often_whether_it_can_be_read_or_not(tmp_path, monkeypatch, world):
    good, bad = write_video(tmp_path / "good.mp4", 20, codec="libx264"), str(tmp_path / "bad.mp4")
    videos = [Video(path, 0) for path in (good, bad, good, bad, bad, good)]
    processes = []
    monkeypatch.setattr("atfr.engine.evaluator.comm.gathered", lambda own: processes.extend(own) or processes)
    for rank in range(world):
        loader = test_loader(TestClips(videos, CLIP, views=2, crops=1), batch_size=3, rank=rank, world=world)
        found = evaluate(Constant(), loader, normalise=Normalizer(GRAY, GRAY), dist_info=DistInfo(rank, world, torch.device("cpu")))
    assert [(view.video, view.view) for view in found.views] == [(video, view) for video in (0, 2, 5) for view in (0, 1)]
    table = SimpleNamespace(dense=1.0, at=lambda bins: 1.0)
    results = summarise(found, table, protocol={})
    assert results["num_videos"] == 3 and results["failed"] == [bad] * 3 and results["protocol"]["decoders"] == {"pyav": 3}


def test_a_video_counts_although_another_row_of_its_file_failed(monkeypatch):
    """As when a disk is lost for a moment: one view of the second row."""
    clips = torch.zeros(1, 3, 1, 2, 2)

    def batch(video, view, failed=()):
        numbers = {"videos": torch.tensor([video]), "views": torch.tensor([view]), "labels": torch.tensor([0])}
        return SimpleNamespace(clips=clips, **numbers, paths=("a",), decoders=("pyav",), failed=failed)

    batches = [batch(0, 0), batch(0, 1), batch(1, 0, (Unreadable(1, "a", "gone"),))]
    found = evaluate(Constant(), batches, normalise=torch.nn.Identity(), dist_info=DistInfo(0, 1, torch.device("cpu")))
    assert [(view.video, view.view) for view in found.views] == [(0, 0), (0, 1)] and list(found.failed) == [1]


# ---- decoders that never come back


def holds_the_lock(seconds):
    """As native code does that does not let go of the interpreter lock."""
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


@pytest.fixture
def wedged(tmp_path, monkeypatch):
    """Videos of which reading one never ends, in a way that the test chooses."""
    videos = [Video(write_video(tmp_path / f"{name}.avi", 10), 0) for name in ("first", "second", "third")]

    def arm(hang):
        whole = decode.AvVideo.read

        def read(self, *arguments, **options):
            if self.path == videos[1].path:
                hang()
            return whole(self, *arguments, **options)

        monkeypatch.setattr(decode.AvVideo, "read", read)
        return videos

    return arm


@pytest.mark.parametrize("kind, workers, hang", [("train", 0, time.sleep), ("test", 0, time.sleep), ("train", 1, time.sleep), ("test", 1, holds_the_lock)])
def test_a_decoder_that_hangs_ends_in_an_error_that_names_its_file_in_time(wedged, kind, workers, hang):
    videos = wedged(lambda: hang(2))
    if kind == "train":
        data, sampler = TrainClips(videos, CLIP, seed=0), TrainSampler(3, seed=0, global_batch=3)
        loader = train_loader(data, sampler=sampler, workers=workers, timeout_s=0.6)
    else:
        loader = test_loader(TestClips(videos, CLIP, views=1, crops=1), batch_size=3, workers=workers, timeout_s=0.6)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"second\.avi"):
        list(loader)
    assert time.monotonic() - began < 1.8


@pytest.mark.parametrize("workers", [0, 1])
def test_the_time_for_which_a_job_is_suspended_is_not_that_of_a_read(wedged, workers):
    """SLURM can suspend a job for another, by the signals that this test sends."""
    begun, tell = os.pipe()

    def take_a_while():
        os.write(tell, b"begun")
        for _ in range(40):
            time.sleep(0.01)

    videos = wedged(take_a_while)
    job = os.fork()
    if job == 0:
        code = 1
        try:
            os.setpgid(0, 0)  # with its worker
            loader = test_loader(TestClips(videos, CLIP, views=1, crops=1), batch_size=3, workers=workers, timeout_s=2)
            code = 0 if len(list(loader)) == 1 else 1
        finally:
            os._exit(code)
    assert os.read(begun, 5) == b"begun"
    os.killpg(job, signal.SIGSTOP)
    time.sleep(3.5)
    os.killpg(job, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(job, 0)[1]) == 0
    os.close(begun)
    os.close(tell)


def test_a_worker_that_dies_over_a_file_names_it(wedged):
    videos = wedged(lambda: os._exit(1))
    with pytest.raises(ChildProcessError, match=r"exited unexpectedly.*second\.avi"):
        list(test_loader(TestClips(videos, CLIP, views=1, crops=1), batch_size=3, workers=1, timeout_s=30))
