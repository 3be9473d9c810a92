"""The programs of tools/ from a user's side: they run, resume, report, and name what is wrong."""

from __future__ import annotations

import csv
import json
import os
import shutil

import pytest
import torch
from forked import Job
from hydra.errors import MissingConfigException
from run_tools import run_script, run_tool, small_job, torchrun

from atfr.engine.run import checkpoint
from atfr.engine.run.run_lock import run_lock
from atfr.engine.trainer import Trainer


@pytest.fixture(scope="module")
def trained(small_videos, tmp_path_factory):
    """The run folder of a finished small job."""
    folder = tmp_path_factory.mktemp("run")
    outcome = run_tool("train", *small_job(small_videos, folder, "model.sgs.gflops=0.6"))
    assert outcome.code == 0, outcome.err
    return folder, outcome


def rows(folder):
    return list(csv.DictReader((folder / "predictions.csv").open()))


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


@pytest.mark.parametrize("batch_size", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_testing_again_gives_the_same_predictions_at_any_batch_size(trained, tmp_path, batch_size):
    folder, _ = trained
    outcome = run_tool("test", f"checkpoint={folder}/checkpoints/best.pt", f"trainer.batch_size={batch_size}", f"trainer.output_dir={tmp_path}")
    assert outcome.code == 0, outcome.err
    for row, other in zip(rows(folder), rows(tmp_path), strict=True):
        assert {**row, "score": ""} == {**other, "score": ""}
        assert float(row["score"]) == pytest.approx(float(other["score"]), abs=2e-4)


def test_overrides_of_a_test_change_the_checkpoints_own_config(trained, tmp_path):
    folder, _ = trained
    best = f"checkpoint={folder}/checkpoints/best.pt"
    outcome = run_tool("test", best, "dataset.clip.views=3", "model.sgs.num_bins=2", f"trainer.output_dir={tmp_path}")
    assert outcome.code == 0, outcome.err
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["num_views"] == 12 and results["bins"]["max"] <= 2
    assert results["protocol"]["frames"] == 8  # of the checkpoint, not of this command


@pytest.mark.slow
def test_a_finished_run_is_only_tested_again_and_more_steps_go_on_from_its_end(small_videos, tmp_path):
    short = small_job(small_videos, tmp_path, "trainer.max_steps=3", "trainer.save_every=1")
    assert run_tool("train", *short).code == 0
    assert checkpoint.load(tmp_path / "checkpoints/last.pt")["step"] == 3
    assert run_tool("train", *short).code == 0
    assert run_tool("train", *small_job(small_videos, tmp_path)).code == 0
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["split"] == "train"] == [1, 2, 3, 4]
    assert checkpoint.load(tmp_path / "checkpoints/last.pt")["step"] == 4


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


@pytest.mark.slow
def test_a_run_interrupted_in_the_middle_of_an_epoch_ends_with_the_same_weights(small_videos, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more = ("trainer.batch_size=2", "trainer.save_every=1", "trainer.test=false", "model.sgs.width=0.3", "trainer.statistics_clips=0")
    assert run_tool("train", *small_job(small_videos, whole, *more)).code == 0
    # Nothing later than the checkpoint of step 3 is written: what lies in the folder then is what a resume finds.
    original = checkpoint.save

    def kill_after_step_3(state, path, **more):
        if state["step"] > 3:
            raise KeyboardInterrupt
        original(state, path, **more)

    checkpoint.save = kill_after_step_3
    try:
        with pytest.raises(KeyboardInterrupt):
            run_tool("train", *small_job(small_videos, broken, *more))
    finally:
        checkpoint.save = original
    assert checkpoint.load(broken / "checkpoints/last.pt")["step"] == 3
    assert run_tool("train", *small_job(small_videos, broken, *more)).code == 0
    first, second = (checkpoint.load(folder / "checkpoints/last.pt")["model"] for folder in (whole, broken))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_it(small_videos, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more = ("trainer.save_every=1", "trainer.keep=5", "trainer.test=false")
    assert run_tool("train", *small_job(small_videos, whole, *more)).code == 0
    shutil.copytree(whole, broken)
    last = broken / "checkpoints/last.pt"
    for number in range(2):  # all that were saved after the last step
        path = checkpoint.earlier(last, number)
        assert checkpoint.load(path)["step"] == 4
        path.write_bytes(path.read_bytes()[:-300])
    outcome = run_tool("train", *small_job(small_videos, broken, *more))
    assert outcome.code == 0, outcome.err
    said = outcome.out + outcome.err
    assert f"checkpoint {last} cannot be read" in said and f"resuming from {last.parent}/last-2.pt" in said and "resuming" in said
    first, second = (checkpoint.load(folder / "checkpoints/last.pt")["model"] for folder in (whole, broken))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    steps = [json.loads(line) for line in (broken / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["split"] == "train"] == [1, 2, 3, 4]
    # None of them can be read: an error, and nothing is begun anew over it.
    for path in last.parent.glob("last*.pt"):
        path.write_bytes(b"")
    outcome = run_tool("train", *small_job(small_videos, broken, *more))
    assert outcome.code == 1 and f"checkpoint {last} cannot be read" in outcome.err


@pytest.mark.slow
@pytest.mark.parametrize("killed_in", ["copyfile", "replace"])
def test_a_kill_while_the_state_before_a_damaged_one_takes_its_place_does_not_begin_anew(small_videos, tmp_path, monkeypatch, killed_in):
    job = small_job(small_videos, tmp_path, "trainer.save_every=1", "trainer.keep=5", "trainer.test=false")
    assert run_tool("train", *job, "trainer.max_steps=2").code == 0
    last = tmp_path / "checkpoints/last.pt"
    last.write_bytes(last.read_bytes()[:-300])

    def kill(source, target):
        if str(target).startswith(str(last)):
            raise KeyboardInterrupt
        return original(source, target)

    module = {"copyfile": shutil, "replace": os}[killed_in]
    original = getattr(module, killed_in)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, killed_in, kill)
        run_tool("train", *job)
    outcome = run_tool("train", *job)
    assert outcome.code == 0 and f"resuming from {last.parent}/last-1.pt" in outcome.out + outcome.err, outcome.err
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["split"] == "train"] == [1, 2, 3, 4]


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


def test_a_checkpoint_of_another_model_or_dataset_is_refused(trained, tmp_path):
    best = f"checkpoint={trained[0]}/checkpoints/best.pt"
    outcome = run_tool("test", best, "model.size=XS", f"trainer.output_dir={tmp_path}")
    assert outcome.code == 1 and "is of another model" in outcome.err
    outcome = run_tool("test", best, "model=x3d", f"trainer.output_dir={tmp_path}")
    assert outcome.code == 1 and "is of another model" in outcome.err
    outcome = run_tool("test", best, "dataset.class_names=[left,up]", f"trainer.output_dir={tmp_path}")
    assert outcome.code == 1 and "error: " in outcome.err
    outcome = run_tool("test", "checkpoint=nowhere.pt")
    assert outcome.code == 1 and "checkpoint nowhere.pt does not exist" in outcome.err


@pytest.mark.slow
def test_a_checkpoint_is_found_in_a_folder_with_any_name(trained, tmp_path):
    folder = tmp_path / "model=x3d_sgs,trainer.seed=1"
    shutil.copytree(trained[0], folder)
    outcome = run_tool("test", f"checkpoint={folder}/checkpoints/best.pt")
    assert outcome.code == 0, outcome.err
    stray = tmp_path / "best.pt"
    shutil.copy(folder / "checkpoints/best.pt", stray)
    outcome = run_tool("test", f"checkpoint={stray}")
    assert outcome.code == 1 and "add trainer.output_dir=... for the results" in outcome.err


@pytest.mark.slow
def test_a_sweep_of_tests_keeps_the_results_of_every_job(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "it's a run"
    shutil.copytree(trained[0], folder)
    before = (folder / "results.json").read_text()
    outcome = run_tool("test", "-m", f"checkpoint={folder}/checkpoints/best.pt", "dataset.clip.views=1,3")
    assert outcome.code == 0, outcome.err
    views = [json.loads(path.read_text())["protocol"]["views"] for path in folder.glob("runs/sweep/*/results.json")]
    assert sorted(views) == [1, 3] and (folder / "results.json").read_text() == before


OTHER_BUDGET = "use python tools/calibrate.py init_from=RUN budgets=[...]"


@pytest.mark.parametrize(
    "argument,way_out",
    [
        ("experiment=ut_interaction", "change the checkpoint's config key by key"),
        pytest.param("~model.sgs", "change the checkpoint's config key by key", marks=pytest.mark.slow),
        ("model.sgs.gflops=0.4", OTHER_BUDGET),
        *(pytest.param(budget, OTHER_BUDGET, marks=pytest.mark.slow) for budget in ("model.sgs.keep_ratio=0.4", "model.sgs.gflops_range=[0.3,1]")),
    ],
)
def test_what_a_test_cannot_override_is_refused(trained, argument, way_out):
    outcome = run_tool("test", f"checkpoint={trained[0]}/checkpoints/best.pt", argument)
    assert outcome.code == 1 and f"tools/test.py does not take {argument}: " in outcome.err and way_out in outcome.err, outcome.err


def test_testing_needs_no_training_videos(trained, small_videos, tmp_path):
    videos = tmp_path / "videos"
    shutil.copytree(small_videos, videos)
    (videos / "train.csv").unlink()
    best = f"checkpoint={trained[0]}/checkpoints/best.pt"
    outcome = run_tool("test", best, f"dataset.root={videos}", f"trainer.output_dir={tmp_path / 'out'}")
    assert outcome.code == 0, outcome.err
    assert [row["prediction"] for row in rows(tmp_path / "out")] == [row["prediction"] for row in rows(trained[0])]


def test_a_run_whose_lists_changed_does_not_resume(small_videos, tmp_path):
    videos = tmp_path / "videos"
    shutil.copytree(small_videos, videos)
    assert run_tool("train", *small_job(videos, tmp_path / "run", "trainer.max_steps=1", "trainer.test=false")).code == 0
    for name in ("train.csv", "test.csv"):
        (videos / name).write_text((videos / name).read_text().replace(",right", ",zebra"))
    outcome = run_tool("train", *small_job(videos, tmp_path / "run"))
    assert outcome.code == 1 and "the training list or its classes changed since" in outcome.err


@pytest.mark.slow
def test_a_step_limit_below_what_was_trained_still_ends_with_a_test(small_videos, tmp_path):
    more = ("trainer.eval_every=2", "trainer.save_every=1")
    assert run_tool("train", *small_job(small_videos, tmp_path, *more, "trainer.max_steps=3", "trainer.test=false")).code == 0
    (tmp_path / "checkpoints/best.pt").unlink()
    state = checkpoint.load(tmp_path / "checkpoints/last.pt")
    checkpoint.save({**state, "evaluated": 0, "best_top1": -1.0}, tmp_path / "checkpoints/last.pt")
    outcome = run_tool("train", *small_job(small_videos, tmp_path, *more, "trainer.max_steps=1"))
    assert outcome.code == 0 and "top-1" in outcome.out, outcome.err


def test_spoilt_weights_give_an_error_and_no_accuracy(trained, tmp_path):
    state = checkpoint.load(trained[0] / "checkpoints/best.pt")
    state["model"]["blocks.5.proj.bias"][0] = torch.nan
    checkpoint.save(state, tmp_path / "checkpoints/best.pt")
    outcome = run_tool("test", f"checkpoint={tmp_path}/checkpoints/best.pt")
    assert outcome.code == 1 and ".mp4 are NaN or infinite" in outcome.err
    assert not (tmp_path / "results.json").exists()


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
def test_the_jobs_of_a_sweep_have_run_folders_of_their_own(small_videos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = [o for o in small_job(small_videos, tmp_path) if not o.startswith("trainer.output_dir")]
    outcome = run_tool("train", "-m", *job, "trainer.max_steps=1", "trainer.test=false", "trainer.seed=0,1")
    assert outcome.code == 0, outcome.err
    folders = [path for path in (tmp_path / "runs/sweep").iterdir() if path.is_dir()]
    assert len(folders) == 2 and all((folder / "checkpoints/last.pt").exists() for folder in folders)


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


def test_a_sweep_of_slurm_jobs_without_slurm_is_refused_in_one_line(monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "/nowhere")
    outcome = run_tool("train", "-m", "hydra/launcher=slurm", "trainer.seed=0,1")
    assert outcome.code == 1 and len(outcome.err.splitlines()) == 1 and "there is no srun on this machine" in outcome.err, outcome.err


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


def test_flops_prints_a_table_and_json():
    clip = ("~experiment", "model.size=tiny", "dataset=synthetic", "dataset.clip.frames=4", "dataset.clip.crop_size=32")
    outcome = run_tool("flops", *clip, "json=true")
    values = json.loads(outcome.out.strip().splitlines()[-1])
    assert values.keys() == {"params", "dense_gflops", "gflops_by_bins"} and len(values["gflops_by_bins"]) == 4
    outcome = run_tool("flops", *clip, "model.sgs.num_bins=2", "json=true")
    assert list(json.loads(outcome.out.strip().splitlines()[-1])["gflops_by_bins"]) == ["1", "2"]
    outcome = run_tool("flops", *clip, "model=x3d")
    assert "dense GFLOPs" in outcome.out and "one multiply-add = one FLOP" in outcome.out


@pytest.mark.parametrize("views", ["eight", pytest.param("two", marks=pytest.mark.slow)])
@pytest.mark.parametrize("world", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_any_number_of_processes_evaluates_each_view_exactly_once_and_alike(trained, small_videos, tmp_path, world, views):
    """Eight views of four videos, which three processes cannot share evenly, or two of two videos, of which the third has none."""
    best, several, more, alone, count = f"checkpoint={trained[0]}/checkpoints/best.pt", tmp_path / "several", [], trained[0], 8
    if views == "two":
        entries = (small_videos / "test.csv").read_text().splitlines()
        (tmp_path / "two.csv").write_text("\n".join(entries[:3]) + "\n")
        more, alone, count = [f"dataset.test={tmp_path / 'two.csv'}", "dataset.clip.views=1"], tmp_path / "alone", 2
        assert run_tool("test", best, *more, f"trainer.output_dir={alone}").code == 0
    job = Job("test", best, *more, f"trainer.output_dir={several}", processes=world, output=tmp_path / "said.txt")
    assert set(job.wait()) == {0}, (tmp_path / "said.txt").read_text()
    expected, results = (json.loads((folder / "results.json").read_text()) for folder in (alone, several))
    assert len(rows(alone)) == expected["num_views"] == count
    for row, other in zip(rows(alone), rows(several), strict=True):
        assert {**row, "score": ""} == {**other, "score": ""}
        assert float(row["score"]) == pytest.approx(float(other["score"]), abs=2e-4)  # clips that are packed with others: float32 sums in another order
    for key in ("top1", "top5", "mean_class_accuracy", "num_videos", "num_views", "failed", "bins"):
        assert expected[key] == results[key]


@pytest.mark.slow
def test_warnings_about_the_lists_are_printed_once_by_any_number_of_processes(trained, small_videos, tmp_path):
    lines = (small_videos / "test.csv").read_text().splitlines()
    (tmp_path / "test.csv").write_text("\n".join([*lines, lines[1]]) + "\n")
    more = (f"dataset.test={tmp_path}/test.csv", f"trainer.output_dir={tmp_path / 'run'}")
    outcome = torchrun(2, "test", f"checkpoint={trained[0]}/checkpoints/best.pt", *more)
    assert outcome.code == 0, outcome.err
    warnings = [line for line in outcome.out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and f"{tmp_path}/test.csv:2: {small_videos}/" in warnings[0] and "is listed 2 times" in warnings[0]
    assert json.loads((tmp_path / "run/results.json").read_text())["num_videos"] == 5


@pytest.mark.slow
def test_two_processes_train_with_everything_that_augments(small_videos, tmp_path):
    more = ("trainer.class_balanced=true", "trainer.mixup=0.8", "trainer.cutmix=1.0", "dataset.clip.randaugment=[2,9]", "dataset.clip.fps=30")
    outcome = torchrun(2, "train", *small_job(small_videos, tmp_path, *more))
    assert outcome.code == 0, outcome.err
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2, 3, 4]
    assert len(rows(tmp_path)) == 8
