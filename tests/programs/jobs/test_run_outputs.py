"""What a training leaves in its run folder, also one that fails: results, checkpoints, a trace."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from predictions import rows
from run_tools import run_tool, small_job

from atfr.engine.run import checkpoint
from atfr.engine.trainer import Trainer


def test_a_run_leaves_everything_that_the_contract_names(trained, small_videos):
    folder, outcome = trained
    for name in ("config.yaml", "metrics.jsonl", "checkpoints/last.pt", "checkpoints/best.pt", "results.json", "predictions.csv"):
        assert (folder / name).is_file(), name
    assert list((folder / "tensorboard").glob("events*"))
    results = json.loads((folder / "results.json").read_text())
    assert results["num_videos"] == 4 and results["num_views"] == 8 and results["failed"] == []
    least, mean, most = (results["gflops"][key] for key in ("min", "mean", "max"))
    assert 0 < least <= mean * (1 + 1e-9) and mean <= most * (1 + 1e-9)  # the mean of equal numbers may differ from them in its last digit
    assert results["bins"]["frames"] == 8 and results["clips_per_second"] > 0
    assert results["protocol"]["views"] == 2 and results["protocol"]["dataset"] == "videolist"
    assert len(rows(folder)) == 8 and {row["label"] for row in rows(folder)} == {"right", "down"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if line["split"] == "val"] == [2, 4]
    for part in ("top-1", "dense GFLOPs", "adaptive GFLOPs", "B' per clip", "clips/s", str(folder), "tensorboard --logdir"):
        assert part in outcome.out


def test_a_diverged_run_leaves_no_checkpoint_of_nan(small_videos, tmp_path):
    assert run_tool("train", *small_job(small_videos, tmp_path, "trainer.max_steps=2", "trainer.test=false")).code == 0
    good = (tmp_path / "checkpoints/last.pt").read_bytes()
    state = checkpoint.load(tmp_path / "checkpoints/last.pt")
    state["model"]["blocks.5.proj.bias"][:] = torch.nan
    checkpoint.save(state, tmp_path / "checkpoints/last.pt")
    spoilt = (tmp_path / "checkpoints/last.pt").read_bytes()
    outcome = run_tool("train", *small_job(small_videos, tmp_path))
    assert outcome.code == 1 and "the loss is nan at step 3" in outcome.err and ".mp4" in outcome.err
    assert (tmp_path / "checkpoints/last.pt").read_bytes() == spoilt != good


def test_where_no_video_of_a_split_can_be_read_the_training_so_far_is_kept(small_videos, tmp_path):
    videos = tmp_path / "videos"
    shutil.copytree(small_videos, videos)
    for path in videos.glob("*[89].mp4"):
        path.write_bytes(b"")
    for path in videos.glob("*1[01].mp4"):
        path.write_bytes(b"")
    outcome = run_tool("train", *small_job(videos, tmp_path / "run"))
    assert outcome.code == 1 and "error: no video of the split could be read" in outcome.err
    assert checkpoint.load(tmp_path / "run/checkpoints/last.pt")["step"] == 2
    for path in videos.glob("*.mp4"):
        path.write_bytes(b"")
    outcome = run_tool("train", *small_job(videos, tmp_path / "run2"))
    assert outcome.code == 1 and "error: cannot read" in outcome.err and "the last of 10 training videos, none of them readable" in outcome.err


@pytest.mark.slow
def test_overfitting_sees_the_same_clips_every_epoch_and_a_trace_is_left(small_videos, tmp_path, monkeypatch):
    seen = []
    original = Trainer.train_step

    def noting(self, batch, **more):
        seen.append((batch.paths, batch.clips.float().mean().item()))
        return original(self, batch, **more)

    monkeypatch.setattr(Trainer, "train_step", noting)
    more = ("trainer.batch_size=2", "trainer.epochs=3", "trainer.overfit_batches=2", "trainer.profile=2", "trainer.test=false", "trainer.deterministic=true")
    outcome = run_tool("train", *small_job(small_videos, tmp_path, *more))
    assert outcome.code == 0, outcome.err
    assert len(seen) == 6 and seen[:2] == seen[2:4] == seen[4:] and seen[0] != seen[1]
    events = json.loads((tmp_path / "profile/trace.json").read_text())["traceEvents"]
    steps = [event for event in events if event["name"].startswith("ProfilerStep") and event["ph"] == "X"]
    assert [event["cat"] for event in steps].count("user_annotation") == 2  # a GPU has its own beside them, gpu_user_annotation
    assert any(event["name"] == "aten::convolution_backward" for event in events)
