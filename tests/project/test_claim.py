"""The study's bookkeeping: order of runs, failures, and the statistics of its report."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from run_tools import ROOT

from atfr.cli.config import check_root
from atfr.data.datasets.synthetic import render, write_video
from atfr.data.video.decode import read_clip
from atfr.models.sgs.config import SGSConfig

sys.path.insert(0, str(ROOT / "studies" / "claim"))
import claim  # noqa: E402
import claim_probe  # noqa: E402
import claim_report  # noqa: E402
import claim_rows  # noqa: E402


def test_rank_correlation_agrees_with_ranks_counted_one_by_one():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, 40).astype(float), rng.normal(size=40)

    def ranks(values):  # half a rank for each equal one: the mean rank of equal values
        return [sum(other < value for other in values) + sum(other == value for other in values) / 2 for value in values]

    assert claim_probe.spearman(x, y) == pytest.approx(np.corrcoef(ranks(x), ranks(y))[0, 1])
    assert claim_probe.spearman(x, np.exp(x)) == pytest.approx(1)
    assert np.isnan(claim_probe.spearman(np.ones(40), y))


def test_the_standard_error_is_that_of_a_mean_over_seeds():
    assert claim_report.standard_error([90.0, 92.0, 94.0]) == pytest.approx(2 / 3**0.5)
    assert np.isnan(claim_report.standard_error([90.0]))


@pytest.fixture
def stubbed(tmp_path, monkeypatch):
    """Runs that only leave their result, in a folder of their own; the order in which they came."""
    monkeypatch.chdir(tmp_path)
    order = []

    def run(job, through):
        order.append((job.method, job.seed))
        if job.method == "stride-4":
            return "exit code 1"
        name = "results.json" if claim.METHODS[job.method].tool == "train" else "calibration.json"
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / name).write_text(json.dumps([{"budget": budget} for budget in claim.BUDGETS]))
        (job.folder / claim.PROBED).write_text("{}")
        return ""

    monkeypatch.setattr(claim, "run", run)
    return order


def test_runs_come_after_those_that_they_start_from_and_only_once(stubbed):
    wanted = [claim.Job("x3d", "uneven", method, 0) for method in ("budgets-features-drawn-0.4", "dense", "features-drawn-0.4")]
    assert claim.run_all(wanted, parallel=2, through=[]) == []
    names = [method for method, _ in stubbed]
    assert sorted(names) == ["budgets-features-drawn-0.4", "dense", "features-drawn-0.4", "warm"]
    assert names[0] == "warm" and names.index("features-drawn-0.4") < names.index("budgets-features-drawn-0.4")
    assert claim.run_all(wanted, parallel=2, through=[]) == [] and len(stubbed) == 4


def test_a_run_that_fails_is_named_and_the_others_go_on(stubbed):
    wanted = [claim.Job("x3d", "uneven", method, 3) for method in ("stride-4", "dense")]
    assert claim.run_all(wanted, parallel=1, through=[]) == ["failed: runs/claim/uneven-x3d/stride-4/3: exit code 1"]
    assert ("dense", 3) in stubbed


def test_a_calibration_that_was_interrupted_between_budgets_is_not_done(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = claim.Job("x3d", "uneven", "untrained-atfr", 0)
    job.folder.mkdir(parents=True)
    (job.folder / "calibration.json").write_text('[{"budget": 0.4}]')
    assert not job.done


def test_what_a_run_has_already_is_not_run_again(stubbed):
    job = claim.Job("x3d", "uneven", "atfr-0.4", 0)
    assert [command[1] for command in job.missing()] == ["tools/train.py", "studies/claim/claim_probe.py"]
    claim.run_all([job], parallel=1, through=[])
    assert job.done
    (job.folder / claim.PROBED).unlink()
    assert [command[1] for command in job.missing()] == ["studies/claim/claim_probe.py"]


def test_ways_take_turns_and_the_first_batch_does_not_count():
    calls = []
    ways = (lambda batch: calls.append(("long", batch)) or time.sleep(0.05), lambda batch: calls.append(("short", batch)) or time.sleep(0.01))
    long, short = claim_probe.in_turns(ways, [0, 1, 2])
    assert calls == [(way, batch) for batch in range(3) for way in ("long", "short")]
    assert long >= 0.1 and 0.02 <= short < long


def test_a_launcher_that_is_not_there_is_a_run_that_failed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no-such-launcher" in claim.run(claim.Job("x3d", "uneven", "warm", 0), ["no-such-launcher"])


def row(method: str, seed: int, top1: float, gflops: float) -> claim_rows.Row:
    return claim_rows.Row("uneven-x3d", method, seed, "", top1, top1, gflops, 6, 1, 9, 16, "1:3 9:5", 0.5, 0.9, 1, 12, float("nan"), float("nan"), 0.6, "abc")


def test_a_verdict_compares_within_seeds_and_allows_the_fixed_cost_one_more_feature():
    rows = [row("atfr-0.3", s, t, 0.48) for s, t in ((0, 90.0), (1, 94.0))] + [row("atfr-0.4", 0, 99.0, 0.6)]
    rows += [row("dense", s, t, 1.0) for s, t in ((0, 91.0), (1, 96.0), (2, 50.0))]
    rows += [row(f"uniform-{k}", s, t, cost) for k, cost, t in ((5, 0.45, 70.0), (6, 0.52, 80.0), (8, 0.6, 99.0)) for s in (0, 1)]
    text = "\n".join(claim_report.verdict("uneven-x3d", claim_report.grouped(rows)))
    assert "atfr-0.3 92.0 % at 0.48 of the GFLOPs" in text
    assert "**below** dense, 93.5 % at 1.00: -1.50 ± 0.50 (2 seeds)" in text
    assert "**above** uniform-6, 80.0 % at 0.52: +12.00 ± 2.00 (2 seeds), the best of uniform-5, uniform-6" in text
    assert "rank correlation 0.90; 1.0 bins for static clips, 12.0 of 16 for busy ones" in text


def test_the_preset_at_more_than_half_is_told_of_but_not_in_the_headline():
    rows = [row(method, 0, t, cost) for method, t, cost in (("atfr-0.4", 99.0, 0.6), ("dense", 91.0, 1.0), ("uniform-8", 98.0, 0.6))]
    assert claim_report.verdict("uneven-x3d", claim_report.grouped([*rows, row("atfr-0.3", 0, 90.0, 0.5)]))[0].endswith("atfr-0.3 90.0 % at 0.50 of the GFLOPs")
    text = claim_report.verdict("uneven-x3d", claim_report.grouped(rows))
    assert text[:3] == [
        "- **uneven-x3d**: atfr-0.4 99.0 % at 0.60 of the GFLOPs",
        "  - **one seed against** dense, 91.0 % at 1.00: +8.00 (1 seed)",
        "  - **one seed against** uniform-8, 98.0 % at 0.60: +1.00 (1 seed), the best of uniform-8",
    ]
    assert "of 0 pairs" in claim_report.headline(claim_report.grouped(rows))
    assert claim_report.verdict("uneven-x3d", claim_report.grouped(rows[1:])) == ["- **uneven-x3d**: not decided, runs are missing."]


def test_above_is_by_two_standard_errors_and_below_by_one():
    assert claim_report.relation([1.0, 3.0]) == "not below"  # 2 ± 1
    assert claim_report.relation([1.1, 3.0]) == "above"
    assert claim_report.relation([-2.0, 0.0]) == "not below"  # -1 ± 1
    assert claim_report.relation([-2.1, -0.1]) == "below"
    assert claim_report.relation([5.0]) == "one seed against"


def test_one_network_at_several_budgets_is_held_against_the_line_between_fixed_cost_networks():
    rows = [row(method, s, t + s, cost) for s in (0, 1) for method, t, cost in (("uniform-4", 60.0, 0.4), ("uniform-8", 80.0, 0.6), ("dense", 90.0, 1.0))]
    rows += [replace(row("budgets-drawn-0.4", s, t + s, cost), budget=b) for s in (0, 1) for b, t, cost in (("0.3", 40.0, 0.3), ("0.5", 71.0, 0.5), ("0.8", 84.0, 0.8))]
    groups = claim_report.grouped(rows)
    trained = {method: {s: next(r for r in rows if r.method == method and r.seed == s) for s in (0, 1)} for method in ("uniform-4", "uniform-8", "dense")}
    (line,) = claim_report.one_network("uneven-x3d", groups, trained)
    assert line.endswith(": below at 0.30 (-20.0 ± 0.0), above at 0.50 (+1.0 ± 0.0), below at 0.80 (-1.0 ± 0.0)")  # at 0.3 against the cheapest


def test_every_method_has_a_start_that_exists_and_a_command_with_its_seed():
    for name, method in claim.METHODS.items():
        assert method.start is None or method.start in claim.METHODS, name
        (first, command), *others = claim.Job(method.networks[0], "even", name, 7).commands().items()
        assert "trainer.seed=7" in command and first == ("results.json" if method.tool == "train" else "calibration.json")
        assert [name for name, _ in others] == [claim.PROBED] * (method.after is not None and method.tool == "train"), name


def test_every_method_has_options_of_the_layer_that_have_an_effect():
    for name, method in claim.METHODS.items():
        words = list(claim.Job(method.networks[0], "uneven", name, 0).commands().values())[0][2:]
        given = {override.key_or_group: override.value() for override in OverridesParser.create().parse_overrides(words)}
        options = {key.removeprefix("model.sgs."): value for key, value in given.items() if key.startswith("model.sgs.")}
        if method.after:
            assert SGSConfig.from_preset(given["model/sgs"], **options).after == method.after, name  # refuses what has no effect
        else:
            assert not options, name


@pytest.mark.parametrize("name", ["dense", "drawn-0.36", "early-0.37", "untrained-atfr"])
def test_the_command_of_a_method_composes(name):
    method = claim.METHODS[name]
    words = list(claim.Job(method.networks[0], "uneven", name, 0).commands().values())[0][2:]
    with initialize_config_dir(str(claim.ROOT / "configs"), version_base="1.3"):
        config = compose(method.tool, [word for word in words if not word.startswith("trainer.")])
    check_root(config)
    assert (config.model.sgs and config.model.sgs.after) == method.after


def test_every_published_run_can_be_run_again():
    jobs = claim.published()
    assert len(jobs) >= 100
    assert {(f"{job.data}-{job.network}", job.method, job.seed) for job in jobs} == {(row.data, row.method, row.seed) for row in claim_rows.saved()}
    for job in jobs:
        assert job.network in claim.METHODS[job.method].networks and (claim.ROOT / "configs/experiment/claim" / f"{job.data}.yaml").exists()


def test_the_documents_say_what_the_published_rows_say():
    groups = claim_report.grouped(claim_rows.saved())
    for document, name, text in (
        (claim_report.RESULTS, "verdict", claim_report.headline(groups)),
        (claim_report.DETAILS, "report", claim_report.body(groups)),
    ):
        assert f"<!-- claim.py: {name} -->\n{text}\n<!-- claim.py: end of {name} -->" in document.read_text(), f"{document}: run studies/claim/claim.py --report-only"


def test_the_headline_counts_where_the_claim_holds_and_where_not():
    figures = (("dense", 90.0, 1.0), ("atfr-0.4", 80.0, 0.5), ("input-0.4", 95.0, 0.5), ("uniform-6", 85.0, 0.5))
    rows = [row(method, s, t + s, cost) for s in (0, 1) for method, t, cost in figures]
    rows += [replace(r, data="even-x3d") for r in rows if not r.method.startswith("atfr")]
    text = claim_report.headline(claim_report.grouped(rows))
    line, _, heads, _, *cells = text.split("\n")
    assert line == (
        "**At half of the GFLOPs or less, of 2 pairs of videos and network: not below the dense network on 1, below it on 1. Against averaging or dropping"
        " frames at equal distances, at the same GFLOPs: above the best of these on 1, not below on 0, below on 1. One seed, not decided: 0.**"
    )
    assert heads == "| videos and network | layer | accuracy, % | GFLOPs of dense | minus dense | minus the best fixed cost |"
    assert cells == [
        "| even-x3d | input-0.4 | 95.5 | 0.50 | +5.00 ± 0.00: above dense | +10.00 ± 0.00: above uniform-6 |",
        "| uneven-x3d | atfr-0.4 | 80.5 | 0.50 | -10.00 ± 0.00: below dense | -5.00 ± 0.00: below uniform-6 |",  # the preset, where it was run
    ]


def test_the_headline_of_one_seed_and_no_rival_decides_nothing():
    text = claim_report.headline(claim_report.grouped([row("atfr-0.4", 0, 80.0, 0.5), row("dense", 0, 90.0, 1.0)]))
    assert "not below the dense network on 0, below it on 0." in text and "One seed, not decided: 1." in text
    assert text.endswith("| uneven-x3d | atfr-0.4 | 80.0 | 0.50 | -10.00: one seed against dense |  |")


def test_a_rival_of_more_seeds_goes_before_one_of_a_single_seed():
    rows = [row(method, s, t, cost) for s in (0, 1) for method, t, cost in (("atfr-0.4", 90.0, 0.5), ("dense", 95.0, 1.0), ("uniform-6", 85.0, 0.5))]
    (found,), _ = claim_report.verdicts("uneven-x3d", claim_report.grouped([*rows, row("stride-6", 0, 99.0, 0.5)]))
    assert found.rival.method == "uniform-6" and found.rival.differences == [5.0, 5.0]


def test_runs_from_scratch_have_as_many_epochs_as_those_with_a_warm_start():
    def epochs(method: str, data: str) -> int:
        command = claim.Job("x3d", data, method, 0).commands()["results.json"]
        return next(int(word.partition("=")[2]) for word in command if word.startswith("trainer.epochs="))

    assert epochs("dense", "uneven_long") == 3 * epochs("dense", "uneven")
    for data in ("uneven", "uneven_long", "even", "ut_interaction"):
        assert epochs("scratch-0.4", data) == epochs("warm", data) + epochs("dense", data) > epochs("warm", data)
    assert epochs("features-briefly", "even") * 3 == epochs("features-0.4", "even") == epochs("dense", "even")


def test_the_probe_holds_some_clips_still_and_knows_how_much_the_others_change():
    dataset = claim.config_of("uneven").dataset
    played = list(itertools.islice(claim_probe.plays(dataset, frames=16, side=32), 10))
    assert [index for index, play in enumerate(played) if play.change == 0] == [0, 5]
    still, change = played[0].clip.float(), [play.change for play in played]
    assert 0 < (still[:, 1:] - still[:, :-1]).abs().mean() < 3  # noise alone, in grey levels
    moving = [float((clip.float()[:, 1:] - clip.float()[:, :-1]).abs().mean()) for clip in (play.clip for play in played)]
    assert claim_probe.spearman(np.array(moving), np.array(change)) > 0.8
    assert played[0].events == 0 and max(play.events for play in played) > 2 and all(play.distractors == 0 for play in played)
    disturbed = next(claim_probe.plays(claim.config_of("distractors").dataset, frames=16, side=32))
    assert disturbed.distractors == render(0, split="test", distractors=True)[2].distractors > 0


def test_every_frame_of_a_busy_clip_is_of_another_video():
    clips = [torch.full((3, 16, 4, 4), index, dtype=torch.uint8) for index in range(50)]
    for clip in claim_probe.shuffled(clips):
        assert len({int(frame.unique()) for frame in clip.unbind(1)}) == 16


def test_small_copies_hold_the_same_frames_and_lists(tmp_path):
    pixels = np.zeros((5, 200, 130, 3), np.uint8)
    pixels += np.arange(0, 250, 50, dtype=np.uint8)[:, None, None, None]
    (tmp_path / "set" / "a b").mkdir(parents=True)
    write_video(tmp_path / "set" / "a b" / "clip.mp4", pixels)
    dataset = OmegaConf.create({"root": str(tmp_path / "copy"), "train": str(tmp_path / "copy/train.csv"), "test": str(tmp_path / "copy/test.csv")})
    for name in ("train.csv", "test.csv"):
        (tmp_path / "set" / name).write_text("relative_path,label\na b/clip.mp4,a b\n")
    for _ in range(2):  # the second time nothing is left to do, and the originals may be gone
        claim.copy_videos(tmp_path / "set", dataset, processes=1)
        copy = read_clip(str(tmp_path / "copy" / "a b" / "clip.mp4"), lambda num_frames, fps: np.arange(num_frames)).frames
        assert copy.shape == (5, 98, 64, 3) and np.abs(copy.mean((1, 2, 3)) - pixels.mean((1, 2, 3))).max() < 6  # encoded twice
        assert (tmp_path / "copy" / "test.csv").read_text() == "relative_path,label\na b/clip.mp4,a b\n"
        shutil.rmtree(tmp_path / "set", ignore_errors=True)


def test_a_folder_without_the_lists_is_named(tmp_path):
    dataset = OmegaConf.create({"root": str(tmp_path / "copy"), "train": str(tmp_path / "copy/train.csv"), "test": str(tmp_path / "copy/test.csv")})
    with pytest.raises(SystemExit, match="set could not be copied .*: --clips"):
        claim.copy_videos(tmp_path / "set", dataset, processes=1)


@pytest.fixture
def report_in(tmp_path, monkeypatch):
    """Makes the report of runs with these top-1, in a folder where nothing was reported yet: (method, seed) -> top-1."""
    monkeypatch.chdir(tmp_path)
    for folder in ("docs", "studies/claim", "data/claim/uneven"):
        Path(folder).mkdir(parents=True)
    verdict, text = (f"<!-- claim.py: {name} -->\nold\n<!-- claim.py: end of {name} -->\n" for name in ("verdict", "report"))
    claim_report.RESULTS.write_text(verdict)
    claim_report.DETAILS.write_text(f"before\n{text}after\n")
    Path("data/claim/uneven/truth.csv").write_text("path,change\ntest/x/a.mp4,0.1\ntest/y/b.mp4,0.5\n")

    def report(found):
        shutil.rmtree("runs", ignore_errors=True)  # as in another checkout
        for (method, seed), top1 in found.items():
            folder = Path("runs", "uneven-x3d", method, str(seed))
            folder.mkdir(parents=True)
            result = {
                "top1": top1, "mean_class_accuracy": top1, "gflops": {"mean": 0.5, "dense": 1.0},
                "bins": {"mean": 4.0, "min": 2, "max": 6, "frames": 16, "histogram": {"2": 1, "6": 1}}, "protocol": {"commit": None},
            }  # fmt: skip
            (folder / "results.json").write_text(json.dumps(result))
            (folder / "predictions.csv").write_text(f"video,bins\n{tmp_path}/data/claim/uneven/test/x/a.mp4,2\n{tmp_path}/data/claim/uneven/test/y/b.mp4,6\n")
            times = {"time_of_dense": 0.6} if seed == 0 else {}  # a run from before times were measured has none
            (folder / "probe.json").write_text(json.dumps({"spearman": 0.9, "static": 1.0, "busy": 12.0, **times}))
        claim_report.report(Path("runs"))
        return claim_report.DETAILS.read_text()

    return report


def test_a_report_holds_every_run_and_means_over_seeds(report_in):
    text = report_in({("atfr-0.4", 0): 90.0, ("atfr-0.4", 1): 94.0})
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| atfr-0.4 |  | 2 | 92.0 ± 2.0 | 92.0 | 0.500 | 0.60 | 4.0 (2-6) of 16 | 1.00, 0.90 | 1.0, 12.0 |" in text
    assert len(claim_rows.ROWS.read_text().splitlines()) == 3
    assert claim_rows.saved()[0].histogram == "2:1 6:1"
    assert "old" not in claim_report.RESULTS.read_text()


def test_a_report_from_few_runs_keeps_the_rows_that_others_found(report_in):
    report_in({("atfr-0.4", 0): 90.0, ("atfr-0.4", 1): 94.0, ("dense", 0): 95.0})
    text = report_in({("atfr-0.4", 1): 98.0, ("dense", 1): 97.0})
    assert {(row.method, row.seed): row.top1 for row in claim_rows.saved()} == {("atfr-0.4", 0): 90, ("atfr-0.4", 1): 98, ("dense", 0): 95, ("dense", 1): 97}
    assert "| atfr-0.4 |  | 2 | 94.0 ± 4.0 |" in text and "4 results" in text
    assert report_in({}) == text  # whoever has no runs at all
