"""The built-in dataset: what its scenes promise, and what its files hold."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from composed_configs import composed
from omegaconf import OmegaConf
from run_tools import ROOT, run_tool

from atfr.data.datasets import synthetic
from atfr.data.datasets import synthetic_distractors as distractors
from atfr.data.datasets import synthetic_scene as scene
from atfr.data.datasets import synthetic_shapes as shapes
from atfr.data.datasets.synthetic import CLASSES, PHASES, generate, render
from atfr.engine.run import checkpoint

SMALL = {"seed": 3, "train": 16, "test": 8}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic")
    generate(folder, **SMALL, workers=1)
    return folder


def timelines(count: int, *, frames: int = 36, dwell: str = "uneven") -> list[scene.Timeline]:
    rng = np.random.default_rng(0)
    return [scene.draw_timeline(rng, frames=frames, dwell=dwell) for _ in range(count)]


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_with_av(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def phase_at(timeline: scene.Timeline, frame: int) -> int | None:
    """Which phase of the order (0..3) a frame shows; None if the object is not there."""
    if not timeline.starts[0] <= frame < timeline.end:
        return None
    return sum(start <= frame for start in timeline.starts) - 1


# ---- scenes


def test_the_same_arguments_give_the_same_clip():
    first, second = render(5, seed=1, split="test"), render(5, seed=1, split="test")
    assert np.array_equal(first[0], second[0]) and first[1:] == second[1:]


@pytest.mark.parametrize("other", [{"seed": 2}, {"split": "train"}, {"index": 13}, {"dwell": "even"}, {"distractors": True}])
def test_another_seed_split_index_or_dwell_gives_another_clip(other):
    arguments = {"index": 5, "seed": 1, "split": "test"}
    assert not np.array_equal(render(**arguments)[0], render(**(arguments | other))[0])


def test_a_clip_is_uint8_rgb_of_the_size_asked_for():
    pixels, label, truth = render(11, size=64, frames=40)
    assert pixels.shape == (40, 64, 64, 3) and pixels.dtype == np.uint8
    assert label == truth.label == 11 % len(CLASSES)


def test_every_class_holds_every_phase_once():
    assert all(sorted(name.split("-")) == sorted(PHASES) for name in CLASSES) and len(set(CLASSES)) == len(CLASSES)


def test_each_phase_takes_each_place_in_equally_many_classes():
    for place in range(len(PHASES)):
        counts = Counter(order[place] for order in scene.ORDERS)
        assert set(counts.values()) == {len(CLASSES) // len(PHASES)}


def test_the_classes_are_closed_under_reversal():
    assert {order[::-1] for order in scene.ORDERS} == set(scene.ORDERS)


@pytest.mark.parametrize("dwell", scene.DWELLS)
@pytest.mark.parametrize("frames", [31, 36, 44])
def test_every_window_of_16_frames_at_stride_2_shows_every_phase(frames, dwell):
    for timeline in timelines(300, frames=frames, dwell=dwell):
        assert min(timeline.dwells) >= (scene.BRIEF_DWELL if dwell == "brief" else scene.MIN_DWELL)
        for start in range(frames - scene.WINDOW + 1):
            shown = {phase_at(timeline, frame) for frame in range(start, start + scene.WINDOW, 2)}
            assert shown >= set(range(len(PHASES)))


@pytest.mark.parametrize("dwell", scene.DWELLS)
def test_how_long_a_phase_lasts_does_not_tell_its_place(dwell):
    dwells = np.array([timeline.dwells for timeline in timelines(4000, dwell=dwell)])  # [N, 4]
    error = dwells.std() / np.sqrt(len(dwells))
    assert np.abs(dwells.mean(0) - dwells.mean()).max() < 4 * error


def test_the_course_of_time_does_not_depend_on_the_class(monkeypatch):
    """The same draw under another class differs in the order of the phases and in nothing else."""
    _, _, truth = render(2)
    monkeypatch.setattr(scene, "ORDERS", scene.ORDERS[3:] + scene.ORDERS[:3])
    pixels, _, other = render(2)
    assert replace(other, change=truth.change, changed_steps=truth.changed_steps) == truth
    monkeypatch.undo()
    before = slice(0, truth.timeline.starts[0])
    assert np.array_equal(render(2)[0][before], pixels[before])


def test_dwell_times_are_uneven_unless_asked_otherwise():
    def longest_share(dwell: str) -> float:
        return float(np.mean([max(t.dwells) / sum(t.dwells) for t in timelines(500, dwell=dwell)]))

    assert longest_share("uneven") > 0.4
    assert longest_share("brief") > longest_share("uneven")
    assert longest_share("even") < 0.3


def test_onsets_vary():
    assert len({timeline.starts[0] for timeline in timelines(200)}) >= 4


@pytest.mark.slow
def test_some_clips_are_almost_static_and_some_are_busy():
    clips = [render(index) for index in range(48)]
    changed = np.array([truth.changed_steps for _, _, truth in clips])
    typical = np.array([np.median(scene.step_changes(pixels)) for pixels, _, _ in clips])  # the events left out
    static, busy = changed <= len(PHASES) + 2, changed >= 30
    assert static.mean() > 0.2 and busy.mean() > 0.3
    assert np.median(typical[busy]) > 2.5 * np.median(typical[static])


@pytest.mark.slow
def test_with_distractors_change_follows_their_amount_and_phases_are_where_they_were():
    disturbed, plain = ([render(i, distractors=with_them)[2] for i in range(80)] for with_them in (True, False))
    change, amount = (np.array([getattr(truth, name) for truth in disturbed]) for name in ("change", "distractors"))
    assert np.corrcoef(change, amount)[0, 1] > 0.8
    assert change[amount > 0.5].mean() > 3 * np.mean([truth.change for truth in plain])
    assert {truth.distractors for truth in plain} == {0}
    assert all(one.timeline == other.timeline for one, other in zip(disturbed, plain))


@pytest.mark.slow
def test_light_and_scenery_tell_nothing_of_the_direction_of_time():
    rng = np.random.default_rng(0)
    light = np.log([distractors._light(rng, 36, 8, 0.7).mean((1, 2)) for _ in range(2000)])  # [N, T]
    assert light[:, :6].std() == pytest.approx(light[:, -6:].std(), rel=0.05)
    steps = np.array([scene.step_changes(render(i, distractors=True)[0]) for i in range(60)])  # [N, T - 1]
    cuts = (steps > 25).nonzero()[1]
    assert len(cuts) > 25 and abs(cuts.mean() - 17) < 3 * 10 / np.sqrt(len(cuts))



@pytest.mark.parametrize("shape", [*PHASES, "bar"])
def test_a_horizontal_flip_shows_the_same_shape(shape):
    def cover(x: float, angle: float) -> np.ndarray:
        one = np.ones(1, np.float32)
        return shapes.cover(shape, 24 * one, x * one, 9 * one, angle * one, 56)

    assert np.allclose(cover(20, 0.3)[..., ::-1], cover(56 - 20, -0.3), atol=1e-3)


@pytest.mark.parametrize(
    "wrong",
    [{"size": 55}, {"size": 8}, {"frames": 30}, {"frames": 49}, {"dwell": "odd"}, {"split": "val"}, {"seed": -1}],
)
def test_a_scene_that_cannot_be_made_is_refused_by_name_and_value(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} must be .*{value!r}"):
        render(0, **wrong)


# ---- files


def test_lists_name_every_video_and_classes_have_equal_shares(root):
    for split in ("train", "test"):
        rows = read_csv(root / f"{split}.csv")
        assert list(rows[0]) == ["path", "label"] and len(rows) == SMALL[split]
        assert {row["path"] for row in rows} == {str(p.relative_to(root)) for p in (root / split).rglob("*.mp4")}
        assert all(Path(row["path"]).parts[:2] == (split, row["label"]) for row in rows)
        assert Counter(row["label"] for row in rows) == dict.fromkeys(CLASSES, SMALL[split] // len(CLASSES))


def test_truth_says_when_the_phases_begin(root):
    rows = read_csv(root / "truth.csv")
    assert tuple(rows[0]) == synthetic.TRUTH_COLUMNS and len(rows) == SMALL["train"] + SMALL["test"]
    _, label, truth = render(9, seed=SMALL["seed"])
    row = rows[9]
    assert row["label"] == CLASSES[label]
    assert [int(start) for start in row["phase_starts"].split()] == list(truth.timeline.starts)
    assert int(row["end"]) == truth.timeline.end and int(row["changed_steps"]) == truth.changed_steps
    assert float(row["busyness"]) == pytest.approx(truth.busyness, abs=1e-4)
    assert float(row["change"]) == pytest.approx(truth.change, abs=1e-4)


def test_videos_are_h264_and_two_decoders_find_the_announced_frames(root):
    path = root / read_csv(root / "train.csv")[7]["path"]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.frames) == ("h264", "yuv420p", 36)
    frames = read_with_av(path)
    decord = pytest.importorskip("decord")
    reader = decord.VideoReader(str(path), num_threads=1)
    assert len(reader) == len(frames) == 36
    batch = reader.get_batch(list(range(35, -1, -5)))
    batch = batch.asnumpy() if hasattr(batch, "asnumpy") else batch.numpy()  # another test may set the bridge
    assert np.abs(batch.astype(int) - frames[35::-5]).mean() < 2


def test_decoded_frames_are_close_to_the_rendered_ones(root):
    rows = read_csv(root / "train.csv")
    for index in range(8):
        pixels, _, _ = render(index, seed=SMALL["seed"])
        error = (read_with_av(root / rows[index]["path"]).astype(float) - pixels) / 255
        assert -10 * np.log10((error**2).mean()) > 28  # dB


def test_worker_count_changes_nothing(root, tmp_path):
    generate(tmp_path, **SMALL, workers=2)
    assert tree(tmp_path) == tree(root)


def test_a_second_call_returns_at_once_and_writes_nothing(root, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    monkeypatch.setattr(synthetic, "render", None)
    generate(root, **SMALL, workers=1)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch, *, after: int) -> None:
    """Start generating and stop after some videos, as a kill would."""
    written = []

    def write_some(path: Path, pixels: np.ndarray) -> None:
        if len(written) == after:
            raise KeyboardInterrupt
        written.append(path)
        synthetic_write(path, pixels)

    synthetic_write = synthetic.write_video
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(synthetic, "write_video", write_some)
        generate(folder, **SMALL, workers=1)


def test_an_interrupted_run_goes_on_where_it_stopped(root, tmp_path, monkeypatch):
    interrupted(tmp_path, monkeypatch, after=5)
    assert not (tmp_path / synthetic.MARKER).exists()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mp4")}
    assert len(before) == 5
    generate(tmp_path, **SMALL, workers=1)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert tree(tmp_path) == tree(root)


def test_a_folder_from_before_distractors_has_none(root, tmp_path):
    shutil.copytree(root, tmp_path / "older")
    marker = tmp_path / "older" / synthetic.MARKER
    parameters = json.loads(marker.read_text())
    del parameters["distractors"]
    marker.write_text(json.dumps(parameters))
    before = tree(tmp_path)
    generate(tmp_path / "older", **SMALL, workers=1)
    assert tree(tmp_path) == before


def test_an_encoder_that_fails_leaves_no_file(tmp_path):
    with pytest.raises(Exception):
        synthetic.write_video(tmp_path / "a.mp4", np.zeros((2, 33, 33, 3), np.uint8))  # odd: yuv420p refuses
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("other", [{"seed": 4}, {"dwell": "even"}, {"distractors": True}])
def test_other_parameters_at_the_same_root_are_refused_by_name(root, other):
    (name,) = other
    with pytest.raises(ValueError) as error:
        generate(root, **(SMALL | other))
    assert f"{name}=" in str(error.value) and str(root) in str(error.value) and "delete" in str(error.value)
    assert "\n" not in str(error.value)


def test_other_parameters_are_refused_for_an_unfinished_root(tmp_path, monkeypatch):
    interrupted(tmp_path, monkeypatch, after=1)
    with pytest.raises(ValueError, match="seed=3, not 4"):
        generate(tmp_path, **(SMALL | {"seed": 4}))


def test_another_format_version_is_refused(root, monkeypatch):
    monkeypatch.setattr(synthetic, "VERSION", synthetic.VERSION + 1)
    with pytest.raises(ValueError, match="version="):
        generate(root, **SMALL)


def test_files_of_unknown_origin_are_refused(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="holds train but no dataset.json"):
        generate(tmp_path, **SMALL)


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_broken_marker_is_refused(tmp_path, text):
    (tmp_path / synthetic.MARKER).write_text(text)
    with pytest.raises(ValueError, match="delete this folder"):
        generate(tmp_path, **SMALL)


@pytest.mark.parametrize("wrong", [{"train": 0}, {"test": 2.5}, {"frames": True}, {"workers": 0}])
def test_wrong_arguments_are_refused_by_name_and_value(tmp_path, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} must be .*{value!r}"):
        generate(tmp_path, **(SMALL | wrong))
    assert list(tmp_path.iterdir()) == []


def test_the_marker_records_all_parameters(root):
    assert json.loads((root / synthetic.MARKER).read_text()) == {
        "version": synthetic.VERSION, "size": 56, "frames": 36, "dwell": "uneven", "distractors": False, **SMALL
    }  # fmt: skip


def test_the_script_writes_a_dataset_and_reports_a_mistake_in_one_line(tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess:
        script = str(ROOT / "scripts" / "make_synthetic.py")
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [sys.executable, script, str(tmp_path), *arguments], capture_output=True, text=True, env=environment
        )

    assert run("--train", "2", "--test", "1", "--workers", "1").returncode == 0
    assert len(list(tmp_path.rglob("*.mp4"))) == 3
    refused = run("--train", "4", "--test", "1")
    assert refused.returncode == 1 and refused.stderr.startswith("make_synthetic: ") and refused.stderr.count("\n") == 1


def test_a_test_of_videos_that_are_not_there_says_how_to_make_them_and_makes_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["dataset.root=here", "dataset.train=8", "dataset.test=9"]
    config = OmegaConf.to_container(composed(*small), resolve=True)
    checkpoint.save({"model": {}, "config": config, "choices": {}, "class_names": list(CLASSES)}, Path("run/checkpoints/best.pt"))
    for tool, *arguments in (("test", "checkpoint=run"), ("export", "checkpoint=run"), ("calibrate", *small, "init_from=run")):
        outcome = run_tool(tool, *arguments)
        assert outcome.code == 1 and outcome.err.splitlines() == [
            f"error: dataset synthetic is not in {tmp_path}/here: set dataset.root to the folder that has it, or make it with"
            " python scripts/make_synthetic.py here --seed 0 --train 8 --test 9 --dwell uneven"
        ]
    assert not Path("here").exists()
    with pytest.raises(ValueError, match="is not in"):
        synthetic.synthetic(root="here", seed=0, train=8, test=9, dwell="uneven", num_classes=8, make=False)
    generate("here", train=8, test=9, workers=1)
    found = synthetic.synthetic(root="here", seed=0, train=8, test=9, dwell="uneven", num_classes=8, make=False)
    assert (len(found.train), len(found.test)) == (8, 9)
