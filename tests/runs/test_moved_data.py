"""The data files of a run may move, but their contents may not change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from run_tools import Outcome, run_tool, small_job

from atfr.data.types import Video, VideoSource
from atfr.engine.run import checkpoint
from atfr.engine.run.contents import contents, require_same_contents
from atfr.engine.run.run_dir import claim_folder

STATE = {"model": {}, "config": {}, "choices": {}, "class_names": []}
SHORT = ("model=x3d", "dataset.clip.frames=4", "dataset.clip.views=1", "trainer.statistics_clips=0", "trainer.test=false")


def source(*rows: tuple[str, int]) -> VideoSource:
    videos = tuple(Video(path, label) for path, label in rows)
    return VideoSource(name="d", train=videos, val=videos[:1], test=videos[:1], class_names=("a", "b"), notes={})


ROWS = (("/data/x/a/1.mp4", 0), ("/data/x/b/2.mp4", 1), ("/data/x/b/3.mp4", 1))


def moved(path: str) -> tuple[tuple[str, int], ...]:
    return tuple((name.replace("/data/x", path), label) for name, label in ROWS)


@pytest.mark.parametrize("path", ["/elsewhere", "/data/x/deeper", "/scratch/job.102/d\udcff ata"])
def test_the_hash_of_a_list_does_not_depend_on_the_folder_of_its_videos(path):
    assert contents(source(*ROWS), None) == contents(source(*moved(path)), None)


@pytest.mark.parametrize(
    "rows", [ROWS[:2], ROWS[::-1], (*ROWS[:2], ("/data/x/b/3.mp4", 0)), (*ROWS[:2], ("/data/x/c/3.mp4", 1)), (*ROWS[:2], ("/data/x/b/4.mp4", 1))],
    ids=["fewer", "order", "label", "folder", "name"],
)  # fmt: skip
def test_changed_rows_are_refused_naming_the_split(rows, tmp_path):
    first, second = contents(source(*ROWS), None), contents(source(*rows), None)
    message = f"the training videos, their labels or their order changed since {tmp_path} was written: see dataset.root and dataset.train; do this"
    with pytest.raises(ValueError, match=message):
        require_same_contents(first, second, of=tmp_path, way_out="do this")
    for split, name in (("val", "validation"), ("test", "test")):
        with pytest.raises(ValueError, match=f"the {name} videos, .*dataset.{split};"):
            require_same_contents(first, {**first, split: "other"}, of=tmp_path, way_out="do this")


def test_paths_may_change_in_a_run_folder_but_numbers_of_videos_may_not(tmp_path):
    def config(**dataset: object) -> dict:
        return {"dataset": dataset, "model": {"weights": "/a/x.pyth"}, "init_from": None}

    claim_folder(tmp_path, config(root="/a", train="/a/train.csv", test=400, manifest=None, clip={"cache": None}), "training", resume=True)
    checkpoint.save(STATE, tmp_path / "checkpoints" / "last.pt")
    now = dict(root="/b", train="/b/t.csv", test=400, manifest="/b/prepared/manifest.csv", clip={"cache": "/tmp/c"})
    claim_folder(tmp_path, {**config(**now), "model": {"weights": "/b/x.pyth"}}, "training", resume=True)
    with pytest.raises(ValueError, match="dataset.test is 400 there and 300 here"):
        claim_folder(tmp_path, config(**{**now, "test": 300}), "training", resume=True)
    with pytest.raises(ValueError, match="model.weights is '/b/x.pyth' there and None here"):
        claim_folder(tmp_path, {**config(**now), "model": {"weights": None}}, "training", resume=True)


def copy_of(videos: Path, target: Path) -> Path:
    """Copy the videos, and write the lists with absolute paths."""
    shutil.copytree(videos, target)
    for name in ("train.csv", "test.csv"):
        header, *rows = (target / name).read_text().splitlines()
        (target / name).write_text("\n".join([header, *(f"{target}/{row}" for row in rows)]) + "\n")
    return target


def train(root: Path, *more: str) -> Outcome:
    """Train on the lists in `root`, without `trainer.output_dir` unless it is given."""
    job = [one for one in small_job(root, root) if not one.startswith(("dataset.train", "dataset.test", "trainer.output_dir"))]
    return run_tool("train", *job, f"dataset.train={root}/train.csv", f"dataset.test={root}/test.csv", f"dataset.clip.cache={root}/cache", *SHORT, *more)


def test_a_run_resumes_after_its_data_moved_and_refuses_other_data(small_videos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = copy_of(small_videos, tmp_path / "job.101")
    assert train(first, "trainer.max_steps=2").code == 0
    (run,) = Path("runs").iterdir()
    shutil.rmtree(first)
    second = copy_of(small_videos, tmp_path / "job.102")
    outcome = train(second)
    assert outcome.code == 0 and "at step 2 of 4" in outcome.out, outcome.err
    assert list(Path("runs").iterdir()) == [run] and checkpoint.load(run / "checkpoints/last.pt")["step"] == 4

    lines = (second / "train.csv").read_text().splitlines(keepends=True)
    (second / "train.csv").write_text("".join([lines[0], *lines[2:], lines[1]]))  # the same rows in another order, which training depends on
    outcome = train(second)
    assert outcome.code == 1 and "the training videos, their labels or their order changed since" in outcome.err, outcome.err
    assert "choose another trainer.output_dir" in outcome.err
    (second / "train.csv").write_text("".join(lines))
    (second / "test.csv").write_text("".join((second / "test.csv").read_text().splitlines(keepends=True)[:-1]))
    outcome = train(second)
    assert outcome.code == 1 and "the test videos, their labels or their order" in outcome.err, outcome.err


@pytest.mark.parametrize("replaced", [pytest.param("one", marks=pytest.mark.slow), "all"])
def test_other_files_with_the_same_names_are_refused_and_a_single_one_is_a_warning(small_videos, tmp_path, replaced):
    run = f"trainer.output_dir={tmp_path / 'run'}"
    first = copy_of(small_videos, tmp_path / "first")
    assert train(first, "trainer.max_steps=1", run).code == 0
    second = copy_of(small_videos, tmp_path / "second")
    names = [row.split(",")[0] for row in (second / "train.csv").read_text().splitlines()[1:]]
    for name in names if replaced == "all" else names[:1]:
        Path(name).write_bytes(Path(name).read_bytes() + b"\0")
    outcome = train(second, "trainer.max_steps=2", run)
    if replaced == "all":
        assert outcome.code == 1 and "the training videos have the same names as when" in outcome.err and "but other contents: see dataset.root" in outcome.err
    else:
        assert outcome.code == 0 and outcome.out.count("some training videos changed since") == 1, outcome.err


def test_a_start_that_is_refused_for_its_data_writes_nothing_into_the_run_folder(small_videos, tmp_path):
    run = tmp_path / "run"
    first, second, renamed = (copy_of(small_videos, tmp_path / name) for name in ("first", "second", "renamed"))
    assert train(first, "trainer.max_steps=1", f"trainer.output_dir={run}").code == 0
    for video in second.glob("*.mp4"):
        video.write_bytes(video.read_bytes() + b"\0")
    for name in ("train.csv", "test.csv"):
        (renamed / name).write_text((renamed / name).read_text().replace(",right", ",zebra"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for root, message in ((second, "but other contents: see dataset.root"), (renamed, "(down, right then, down, zebra now)")):
        outcome = train(root, f"trainer.output_dir={run}")
        assert outcome.code == 1 and message in outcome.err, outcome.err
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_jobs_of_a_sweep_over_paths_have_different_run_folders(small_videos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copies = [copy_of(small_videos, tmp_path / name) for name in ("a", "b")]
    job = [one for one in small_job(tmp_path, tmp_path) if not one.startswith(("dataset.root", "trainer.output_dir"))]
    outcome = run_tool("train", "-m", *job, *SHORT, "trainer.max_steps=1", f"dataset.root={','.join(map(str, copies))}")
    assert outcome.code == 0, outcome.err
    assert len(list(tmp_path.glob("runs/sweep/*/checkpoints/last.pt"))) == 2


@pytest.mark.slow
def test_another_schedule_is_refused_naming_the_command_that_starts_from_the_run(small_videos, tmp_path):
    run, new = tmp_path / "run", tmp_path / "new"
    job = [one for one in small_job(small_videos, run, *SHORT) if not one.startswith("trainer.epochs")]
    assert run_tool("train", *job, "trainer.epochs=1", "trainer.max_steps=1").code == 0
    for changed in ("trainer.epochs=2", "optimizer.lr=0.2"):
        outcome = run_tool("train", *job, "trainer.epochs=1", changed)
        key = changed.partition("=")[0]
        assert outcome.code == 1 and f"holds another experiment: {key} is" in outcome.err
        assert outcome.err.rstrip().endswith(f"(to start from this run's weights: init_from={run} trainer.output_dir=NEW)"), outcome.err
    start = [*job, "trainer.epochs=2", "trainer.max_steps=1", f"init_from={run}", f"trainer.output_dir={new}"]
    outcome = run_tool("train", *start)
    assert outcome.code == 0, outcome.err

    # The weights that it started from may move, but not change into others; if they stay where they are, they are not looked at again.
    run.rename(tmp_path / "moved")
    outcome = run_tool("train", *start[:-2], f"init_from={tmp_path / 'moved'}", start[-1])
    assert outcome.code == 0 and "is ignored: this run resumes from" in outcome.out, outcome.err
    shutil.copytree(new, tmp_path / "other")
    outcome = run_tool("train", *start[:-2], f"init_from={tmp_path / 'other'}", start[-1])
    assert outcome.code == 1 and "model.weights or init_from names other weights than those that" in outcome.err, outcome.err
    shutil.rmtree(tmp_path / "moved")
    outcome = run_tool("train", *start[:-2], f"init_from={tmp_path / 'moved'}", start[-1])
    assert outcome.code == 0, outcome.err
