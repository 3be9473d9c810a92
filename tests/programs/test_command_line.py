"""The command line: paths that hydra's grammar refuses, options that do not exist, failing sweeps, closed pipes."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from run_tools import ROOT, run_script, run_tool, small_job

from atfr.cli.command import run_name
from atfr.cli.command.arguments import quote_where_needed, refuse_flags
from atfr.cli.command.errors import as_text, explain, is_of_the_command
from atfr.cli.command.home import expand_home
from atfr.cli.command.run_name import folder_name

NAMES = ("Видео", "视频", "é à", "a=b", "x,y", "[1]", "(copy)", "{z}", "it's", 'say "hi"', "$HOME", "100%!", "#1;2&3", "back\\slash", "~old")


def values(argument: str) -> list[object]:
    """What hydra's own parser makes of an argument's value, one entry a job of a sweep."""
    (override,) = OverridesParser.create().parse_overrides([argument])
    plain = lambda value: [plain(item) for item in value] if isinstance(value, list) else getattr(value, "text", value)  # noqa: E731
    return [plain(value) for value in (override.value().list if override.is_sweep_override() else [override.value()])]


@pytest.mark.parametrize("name", [*(f"/data/{name}" for name in NAMES), "~/videos", "~", "~root/videos"])
@pytest.mark.parametrize("key", ["dataset.root", "+model.weights", "init_from", "output"])
def test_a_path_needs_no_quotes(key, name):
    (argument,) = quote_where_needed([f"{key}={name}"])
    assert argument.startswith(f"{key}=") and values(argument) == [name]
    assert quote_where_needed([argument]) == [argument]  # a process that is started with it leaves it as it is


@pytest.mark.parametrize("name", [name for name in NAMES if "," not in name])
def test_the_paths_of_a_sweep_are_separated_by_commas(name):
    *_, argument = quote_where_needed(["-m", f"dataset.root=/data/{name},~/b,/c"])
    assert values(argument) == [f"/data/{name}", "~/b", "/c"]


def test_hydras_own_folders_may_begin_with_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    assert quote_where_needed(["-m", "hydra.sweep.dir=~/sweep"]) == ["-m", "hydra.sweep.dir=/home/ann/sweep"]


def test_a_path_with_a_comma_that_exists_is_one_value_of_a_sweep(tmp_path):
    (tmp_path / "a,b").mkdir()
    assert values(quote_where_needed(["-m", f"dataset.root={tmp_path}/a,b"])[-1]) == [f"{tmp_path}/a,b"]


def test_the_paths_of_a_list_are_quoted_one_by_one():
    assert values(quote_where_needed(["dataset.subset=[~/train é.txt,/data/val.txt]"])[0]) == [["~/train é.txt", "/data/val.txt"]]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--checkpoint", "runs/mine"], "--checkpoint is not an option: options are KEY=VALUE, such as checkpoint=runs/mine"),
        (["trainer.seed=1", "--lr=0.1"], "--lr=0.1 is not an option: options are KEY=VALUE, such as optimizer.lr=0.1"),
        (["--epochs", "model=x3d"], "--epochs is not an option: options are KEY=VALUE, such as trainer.epochs=VALUE"),
        (["--batch-size", "4"], "--batch-size is not an option: options are KEY=VALUE, such as trainer.batch_size=4"),
    ],
)
def test_an_option_written_as_a_flag_is_told_how_it_is_written(arguments, message):
    outcome = run_tool("flops", *arguments)
    assert outcome.code == 1 and outcome.err == f"error: {message}\n"


def test_the_flags_of_hydra_are_left_to_it():
    refuse_flags(["--config-dir=.", "--cfg", "job", "--multirun", "-m", "model=x3d"])


@pytest.mark.parametrize("tool, message", [("test", ", such as checkpoint=runs/mine"), ("predict", ", such as video=runs/mine"), ("flops", "")])
def test_a_value_without_its_key_is_told_which_one_it_may_be_of(tool, message):
    outcome = run_tool(tool, "runs/mine")
    assert outcome.code == 1 and outcome.err == f"error: runs/mine is not understood: options are KEY=VALUE{message}\n"


@pytest.mark.parametrize(
    "argument",
    [
        *("trainer.seed=0,1", "trainer.epochs=range(1,3)", "model.sgs.after=[slow.res3,fast.res2]", "optimizer=[sgd"),
        *("dataset.root=${oc.env:HOME}/x", 'dataset.root="a b"', "~experiment"),
    ],
)
@pytest.mark.parametrize("sweep", [[], ["-m"]])
def test_everything_else_is_left_to_hydra(argument, sweep):
    assert quote_where_needed([*sweep, argument]) == [*sweep, argument]


def test_a_leading_tilde_is_expanded_in_every_path_of_a_config(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    dataset = {"root": "~/v", "train": "${dataset.root}/t.csv", "subset": ["~/s"], "class_names": ["~a"], "size": 3, "x": None}
    config = OmegaConf.create({"dataset": dataset, "init_from": "~", "y": "a~/b"})
    expand_home(config)
    assert OmegaConf.to_container(config, resolve=True) == {
        "dataset": {"root": "/home/ann/v", "train": "/home/ann/v/t.csv", "subset": ["/home/ann/s"], "class_names": ["~a"], "size": 3, "x": None},
        "init_from": "/home/ann",
        "y": "a~/b",
    }
    config.dataset.root = "~nobody.here/v"
    with pytest.raises(ValueError, match="dataset.root=~nobody.here/v: ~nobody.here is no home directory on this machine; write ./~nobody.here/v"):
        expand_home(config)


@pytest.mark.slow
def test_a_tilde_means_the_home_directory_in_every_option_of_a_training_a_test_and_an_export(small_videos, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    (home / "videos").symlink_to(small_videos)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    job = [o for o in small_job(small_videos, tmp_path) if not o.startswith(("dataset.root", "dataset.test", "trainer.output_dir"))]
    paths = ["dataset.root=~/videos", "dataset.test=~/videos/test.csv", "trainer.output_dir=~/Прогон 1", "dataset.clip.cache=~/cache"]
    trained = run_tool("train", *job, *paths, "trainer.max_steps=1")
    assert trained.code == 0, trained.err
    assert (home / "Прогон 1/results.json").exists() and any((home / "cache").rglob("*.npz"))
    tested = run_tool("test", "checkpoint=~/Прогон 1", "trainer.output_dir=~/tested")
    assert tested.code == 0 and (home / "tested/results.json").exists(), tested.err
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


@pytest.mark.parametrize(
    "argument,message",
    [
        pytest.param("lr=0.1", "lr is not an option; did you mean optimizer.lr?", marks=pytest.mark.slow),
        ("+lr=0.1", "lr is not an option; did you mean optimizer.lr?"),
        ("trainer.epoch=3", "trainer.epoch is not an option; did you mean trainer.epochs?"),
        ("+trainer.epoch=3", "; did you mean trainer.epochs? it takes output_dir, batch_size"),
        pytest.param("optimizer.Lr=3", "optimizer.Lr is not an option; did you mean optimizer.lr?", marks=pytest.mark.slow),
        pytest.param("trainer.batchsize=3", "trainer.batchsize is not an option; did you mean trainer.batch_size?", marks=pytest.mark.slow),
        pytest.param("model.sgs.keepratio=1", "model.sgs.keepratio is not an option; did you mean model.sgs.keep_ratio?", marks=pytest.mark.slow),
        pytest.param("num_bins=4", "num_bins is not an option; did you mean model.sgs.num_bins?", marks=pytest.mark.slow),
        ("frames=4", "frames is not an option; did you mean dataset.clip.frames?"),
        pytest.param("sgs=uniform", "sgs is not an option; did you mean model/sgs?", marks=pytest.mark.slow),
        ("model.sgs=uniform", "; a file of that group is chosen with model/sgs=uniform"),
        pytest.param("modle=x3d", "modle is not an option; did you mean model?", marks=pytest.mark.slow),
        ("model=x3dsgs", "model=x3dsgs does not exist; did you mean x3d_sgs? choose one of c2d, "),
        ("model.size=tny", "model.size=tny does not exist; did you mean model.size=tiny? there are tiny, XS, S, M, L, XL"),
        ("experiment=x3d/kinetic400", "experiment=x3d/kinetic400 does not exist; did you mean x3d/kinetics400"),
        ("model.wings=3", "model.wings is not an option; there are model.size"),
        ("model.backbone.width=3", "; an argument of model.backbone is added with +model.backbone.width=3"),
    ],
)
def test_an_option_that_does_not_exist_is_answered_with_the_one_that_is_meant(argument, message):
    own = ["model=custom_sgs"] if argument.startswith("model.backbone") else []
    outcome = run_tool("train" if argument.startswith("+") else "flops", *own, argument)
    assert outcome.code == 1 and outcome.err.startswith("error: ") and outcome.err.count("\n") == 1 and message in outcome.err, outcome.err
    assert "use +" not in outcome.err


def test_the_options_of_the_chosen_groups_are_suggested():
    assert "did you mean optimizer.betas?" in run_tool("train", "optimizer=adamw", "beta=[0.9,0.99]").err
    assert "did you mean schedule.milestones?" in run_tool("flops", "schedule=multistep", "milestone=[0.5]").err
    assert "did you mean short_side?" in run_script("scripts/prepare.py", "dataset=ucf101", "shortside=3").err
    assert run_script("scripts/prepare.py", "dataset=ucf101", "model=x3d").err.startswith("error: model is not an option; there are dataset, root")


def test_the_jobs_of_a_sweep_go_on_after_one_that_fails_and_its_end_lists_those_that_did(small_videos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = [o for o in small_job(small_videos, tmp_path) if not o.startswith("trainer.output_dir")]
    outcome = run_tool("train", "-m", *job, "trainer.test=false", "trainer.max_steps=1", "trainer.mixup=-1,null", "trainer.seed=0")
    reason = "trainer.mixup must be above 0 or null, not -1"
    said = [line for line in outcome.err.replace("\r", "\n").splitlines() if line.startswith("error") or "Traceback" in line or "Error" in line]
    assert outcome.code == 1 and said == [f"error: {reason}", f"error: 1 of 2 jobs failed: #0 trainer.mixup=-1 ({reason})"]
    assert len(list(tmp_path.glob("runs/sweep/*/checkpoints/last.pt"))) == 1


def test_a_bug_in_a_job_of_a_sweep_has_its_traceback_and_does_not_end_the_sweep(monkeypatch):
    monkeypatch.setattr("atfr.cli.builders.build_model", lambda *_, **__: {}["a bug"])
    outcome = run_tool("flops", "-m", "num_classes=1,2", "hydra.sweep.dir=.")
    assert outcome.code == 1 and outcome.err.count("Traceback") == 2
    assert outcome.err.splitlines()[-1] == "error: 2 of 2 jobs failed: #0 num_classes=1 (KeyError: 'a bug'); #1 num_classes=2 (KeyError: 'a bug')"


def test_a_job_that_failed_elsewhere_is_reported_in_one_line():
    lines = ["Job 7 (task: 0) with path /s/7_0_result.pkl", "has not produced any output (state: FAILED)", "Error stream produced:", "----", "error: a reason"]
    error = pytest.importorskip("submitit.core.utils").UncompletedJobError("\n".join(lines))
    assert is_of_the_command(error)
    assert explain(error, "train", []) == f"a job of the sweep failed: a reason ({lines[0]}); other jobs may still run"


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered,arguments", [("", ["tools/flops.py", "--cfg", "job"]), ("1", ["tools/flops.py", "dataset=synthetic", "model=x3d"])])
def test_nobody_is_told_that_the_output_is_no_longer_read(arguments, unbuffered):
    read, write = os.pipe()
    os.close(read)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, stdout=write, stderr=subprocess.PIPE, text=True, timeout=100)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def sweep_folders(folder: Path, monkeypatch, *overrides: str) -> set[str]:
    """The names of the run folders of a sweep, whose jobs only name them."""
    monkeypatch.chdir(folder)
    named: set[str] = set()
    monkeypatch.setattr("atfr.cli.builders.clip_settings", lambda config: named.add(run_name.run_folder(None).name) or {}["stop"])
    run_tool("flops", "-m", *overrides)
    return named


@pytest.mark.slow
def test_the_name_of_a_sweeps_job_begins_with_what_tells_it_from_the_others(tmp_path, monkeypatch):
    fixed = ["dataset=videolist", f"dataset.root=/{'x' * 90}", "dataset.train=a.csv", "dataset.test=b.csv", "trainer.workers=1"]
    names = sweep_folders(tmp_path, monkeypatch, *fixed, "trainer.seed=0,1", "model=x3d,slow", "+optimizer.x=5")
    assert {"_".join(name.split("_")[:2]) for name in names} == {f"model-{model}_trainer.seed-{seed}" for model in ("x3d", "slow") for seed in (0, 1)}
    assert {name.split("_")[2] for name in names} == {"dataset-videolist"}  # then the choices of groups
    # In another order, with more values and other quotes, the jobs that were there keep their names.
    quotes = [override.replace("=", "='") + "'" for override in fixed[:4]]
    again = ["model=slow,c2d,x3d", "trainer.workers=8", "trainer.seed=1,0", "+optimizer.x=5", *quotes]
    assert names < sweep_folders(tmp_path, monkeypatch, *again)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["dataset.root=/a b"]])
def test_the_runs_of_the_official_splits_are_found_as_the_documentation_says(tmp_path, monkeypatch, more):
    pattern = re.search(r"mean_over_splits.py runs/sweep/(\S+)", (ROOT / "docs/datasets.md").read_text())[1]
    assert len(fnmatch.filter(sweep_folders(tmp_path, monkeypatch, "dataset=ucf101", "dataset.split=1,2,3", *more), pattern)) == 3


@pytest.mark.parametrize("one,other", [("root=/a b", "root=/a_b"), ("x=" + "y" * 200, "x=" + "y" * 201), ("x=" + "视" * 90, "x=" + "频" * 90)])
def test_other_overrides_have_other_names_that_every_file_system_takes(one, other):
    first, second = folder_name([one]), folder_name([other])
    assert first != second and max(len(os.fsencode(first)), len(os.fsencode(second))) < 120 and first.isascii()


@pytest.mark.slow
def test_a_run_folder_stands_for_its_best_checkpoint_and_one_without_lists_what_it_has(small_videos, tmp_path):
    job = small_job(small_videos, tmp_path / "run", "trainer.max_steps=1", "trainer.test=false")
    assert run_tool("train", *job).code == 0
    tested = run_tool("test", f"checkpoint={tmp_path}/run", "dataset.clip.fps=15")
    assert tested.code == 0, tested.err
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["protocol"]["checkpoint"] == f"{tmp_path}/run/checkpoints/best.pt"
    # What was tested is in the protocol, and the whole config beside it.
    assert (results["protocol"]["fps"], results["protocol"]["failed"], results["protocol"]["execution"]) == (15, 0, "packed")
    assert yaml.safe_load((tmp_path / "run/test_config.yaml").read_text())["dataset"]["clip"]["fps"] == 15
    (tmp_path / "run/checkpoints/best.pt").unlink()
    for tool, option in (("test", "checkpoint"), ("export", "checkpoint"), ("train", "init_from"), ("calibrate", "init_from"), ("train", "model.weights")):
        outcome = run_tool(tool, *(small_job(small_videos, tmp_path / "other") if option != "checkpoint" else []), f"{option}={tmp_path}/run")
        message = f"error: {option}={tmp_path}/run is a folder without checkpoints/best.pt; it holds checkpoints/last.pt"
        assert outcome.code == 1 and outcome.err.splitlines()[-1] == message, outcome.err


def test_a_batch_that_does_not_fit_into_the_gpu_names_the_options_that_make_it_smaller():
    text = as_text(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB"))
    assert text.startswith("error: CUDA out of memory. Tried to allocate 2.00 GiB; run a batch in parts with trainer.accumulate=2 or more")
    assert "\n" not in text
