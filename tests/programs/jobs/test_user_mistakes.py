"""What a user can mend is said in one line: wrong values, unknown keys, a folder in use, options without effect."""

from __future__ import annotations

import os

import pytest
from forked import Job
from hydra.errors import MissingConfigException
from run_tools import run_script, run_tool, small_job

from atfr.engine.run import checkpoint
from atfr.engine.run.run_lock import run_lock


@pytest.mark.slow
def test_a_second_job_in_a_folder_is_refused_in_one_line_whatever_it_is(trained, small_videos, tmp_path):
    weights = f"model.weights={trained[0]}/checkpoints/best.pt"
    with run_lock(tmp_path / "run"):
        for name, more in (("train", ()), ("train", ("trainer.devices=2", "trainer.accelerator=cpu")), ("calibrate", (weights, "budgets=[0.9]"))):
            done = Job(name, *small_job(small_videos, tmp_path / "run", *more), output=tmp_path / "said")
            assert done.wait() == [1]
            (line,) = [line for line in (tmp_path / "said").read_text().splitlines() if "error" in line]  # torch may log more of lost connections
            assert line.startswith(f"error: another job works in run folder {tmp_path}/run: process {os.getpid()} on "), line
            (tmp_path / "said").unlink()
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.lock"]


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["dataset=kinetics400", "model=x3d_sgs", "dataset.root=/nowhere/k400"], "dataset kinetics400: root /nowhere/k400 is not a folder; get the lists"),
        (["trainer.batch_size=many"], "trainer.batch_size='many' is not of type int"),
        (["model.sgs.keep_ratio=half"], "model.sgs.keep_ratio='half' is not of type float"),
        (["model.sgs.after=res9"], "sgs.after='res9' is not a stage"),
        (["model.size=huge"], "model.size"),
        (["+model.wings=2"], "model.wings is not an option of atfr.models.backbones.x3d.x3d"),
        (["model._target_=atfr.models.x9d"], "model._target_='atfr.models.x9d' cannot be imported"),
        (["dataset.clip.crops=2"], "dataset.clip.crops is 2, it must be 1 or 3"),
        (["trainer.accelerator=tpu"], "trainer.accelerator='tpu' does not exist; choose one of auto, cpu, cuda"),
        (["trainer.devices=0"], "trainer.devices=0 must be at least 1, or null"),
        (["optimizer.lr=1e30", "optimizer.momentum=0.0", "optimizer.nesterov=false", "trainer.clip_norm=null"], "step 2: SGS after 'stem': the features of clip"),
        (["trainer.mixup=0"], "trainer.mixup must be above 0 or null, not 0"),
        (["trainer.eval_every=0"], "trainer.eval_every must be at least 1, not 0"),
        (["dataset.test=null"], "dataset videolist has no val videos"),
        (["+foo=3"], "foo is not an option; there are dataset, model"),
        (["+trainer.clip=5"], "trainer.clip is not an option of"),
        (["model/sgs=reference", "model.sgs.kernel=mean"], "kernel=mean passes no gradient to embedding=mlp"),
        (["dataset.train=nowhere.csv"], "nowhere.csv"),
        (["model=nope"], "model=nope does not exist; choose one of c2d, c2d_sgs, csn"),
        (["experiment=null"], "takes the name of one of its files, not null: ~GROUP (such as ~experiment)"),
        (["model/sgs=nope"], "model/sgs=nope does not exist; choose one of atfr, frozen, glance, identity, off, random, reference, stride, uniform"),
        (["model=x3d", "model/sgs=reference"], "this model has none: take its twin, model=NAME_sgs"),
        (["optimizer=[sgd"], "optimizer=[sgd is not understood ("),
        (["model.nope=3"], "model.nope is not an option; there are model.size"),
        (["trainer.epochs=${nothing}"], "Interpolation key 'nothing' not found"),
    ],
)
def test_what_a_user_can_mend_ends_in_one_line_and_exit_code_1(small_videos, tmp_path, arguments, message):
    base = [] if any(a.startswith("dataset=") for a in arguments) else small_job(small_videos, tmp_path / "run")
    outcome = run_tool("train", *base, *arguments)
    last = outcome.err.replace("\r", "\n").strip().splitlines()[-1]
    assert outcome.code == 1 and last.startswith("error: ") and message in last, outcome.err


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["optimizer.lr=-1"], "optimizer.lr must be"),
        (["trainer.mixup=-1"], "trainer.mixup must be above 0"),
        (["model.sgs.gflops=0.05"], "budget of 0.05 x dense cannot be met"),
        (["dataset.clip.frames=1", "model.sgs.gflops=0.5"], "leaves nothing to sample"),
        pytest.param(["model.sgs.gflops=0.5", "model.sgs.gflops_range=[0.05,1]"], "budget of 0.05 x dense cannot be met", marks=pytest.mark.slow),
    ],
)
def test_a_start_that_fails_leaves_no_run_folder(small_videos, tmp_path, arguments, message):
    outcome = run_tool("train", *small_job(small_videos, tmp_path / "run", *arguments))
    assert outcome.code == 1 and message in outcome.err, outcome.err
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_gives_no_config_is_told_so_in_one_line_by_every_program_unless_all_is_asked_for(monkeypatch):
    for script in ("tools/train.py", "tools/flops.py", "scripts/prepare.py"):
        outcome = run_script(script, "dataset=nope")
        assert outcome.code == 1 and outcome.err.count("\n") == 1 and outcome.err.startswith("error: dataset=nope does not exist; choose one of hmdb51"), outcome.err
    outcome = run_tool("train", "-m", "dataset=nope,synthetic")
    assert outcome.code == 1 and outcome.err.startswith("error: dataset=nope does not exist")
    assert "HYDRA_FULL_ERROR" not in os.environ
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(MissingConfigException):
        run_tool("flops", "dataset=nope")


def test_an_unknown_key_is_refused_with_its_name():
    outcome = run_tool("train", "trainer.batchsize=3")
    assert outcome.code == 1 and "trainer.batchsize" in outcome.err


@pytest.mark.slow
def test_a_dense_network_ignores_the_options_of_a_layer_and_says_so(small_videos, tmp_path):
    job = small_job(small_videos, tmp_path, "model=x3d", "trainer.max_steps=1", "trainer.test=false")
    outcome = run_tool("train", *job, "model.sgs.num_bins=4")
    assert outcome.code == 0 and (outcome.out + outcome.err).count("model=x3d does not sample: model.sgs.num_bins=4 ignored") == 1, outcome.err
    assert checkpoint.load(tmp_path / "checkpoints/last.pt")["config"]["model"]["sgs"] is None
    again = run_tool("train", *job, "model.sgs.num_bins=8")  # the same experiment
    assert again.code == 0, again.err
    tested = run_tool("test", f"checkpoint={tmp_path}/checkpoints/best.pt", "model.sgs.num_bins=4")
    assert tested.code == 0 and (tested.out + tested.err).count("model=x3d does not sample") == 1, tested.err
