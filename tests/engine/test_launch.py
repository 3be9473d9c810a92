"""How processes find each other: the launchers' variables, starting them, and how a job of several ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from datetime import timedelta
from pathlib import Path

import launched_parts
import pytest
import torch
from forked import Job, ended, srun_places, start, start_tool
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from run_tools import ROOT, run_tool, small_job

from atfr.cli import config as configuration
from atfr.cli import launch
from atfr.engine.distributed import comm, rendezvous
from atfr.engine.distributed.launch_env import LaunchEnv, hosts, read_launch_env

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400"}
# The sixth of eight tasks, the second one of the third of three machines; a batch script's own variables are there too.
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_NODELIST": "login,node[07-09]",
    "SLURM_STEP_NODELIST": "node[07-08],gpu2",
}


def test_torchruns_variables_are_taken_also_inside_a_slurm_step():
    place = read_launch_env({**SRUN, **TORCHRUN})
    assert place == LaunchEnv("torchrun", 3, 4, 1, "10.0.0.1", 29400)
    assert read_launch_env({**TORCHRUN, "RANK": "0"}).keeps_store
    assert not read_launch_env({**TORCHRUN, "RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}).keeps_store


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_a_variable_of_torchrun_that_is_missing_is_named(name):
    with pytest.raises(ValueError, match=f"but not {name}: start with torchrun"):
        read_launch_env({key: value for key, value in TORCHRUN.items() if key != name})


def test_a_task_of_srun_meets_the_others_on_the_first_host_of_its_step():
    place = read_launch_env(SRUN)
    assert (place.launcher, place.rank, place.world, place.local_rank, place.address) == ("srun", 5, 8, 1, "node07")
    assert not place.keeps_store and read_launch_env({**SRUN, "SLURM_PROCID": "0"}).keeps_store


def test_steps_and_jobs_that_run_side_by_side_get_ports_of_their_own():
    found = {read_launch_env({**SRUN, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).port for job in range(4700, 4800) for step in range(8)}
    assert len(found) == 100 * 8 and 1024 < min(found) and max(found) < 32768
    assert len({read_launch_env({**SRUN, "SLURM_PROCID": str(rank)}).port for rank in range(8)}) == 1


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID", "SLURM_STEP_ID"])
def test_a_variable_of_srun_that_is_missing_is_named(name):
    with pytest.raises(ValueError, match=f"but {name} is not set"):
        read_launch_env({key: value for key, value in SRUN.items() if key != name})


def test_a_variable_that_is_no_number_is_named():
    with pytest.raises(ValueError, match="SLURM_PROCID='first' is not a number"):
        read_launch_env({**SRUN, "SLURM_PROCID": "first"})
    with pytest.raises(ValueError, match="WORLD_SIZE='' is not a number"):
        read_launch_env({**TORCHRUN, "WORLD_SIZE": ""})


@pytest.mark.parametrize("environment", [{}, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, {**SRUN, "SLURM_STEP_NUM_TASKS": "1"}])
def test_no_launcher_a_batch_script_and_a_step_of_one_task_are_one_process(environment):
    assert read_launch_env(environment) == LaunchEnv("none", rank=0, world=1, local_rank=0)


@pytest.mark.parametrize(
    "nodelist,expected",
    [
        ("node[01-03,7],gpu2", ["node01", "node02", "node03", "node7", "gpu2"]),
        ("127.0.0.[1-2]", ["127.0.0.1", "127.0.0.2"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("n[099-101]-ib", ["n099-ib", "n100-ib", "n101-ib"]),
        ("rack[1-2]n[3,5]", ["rack1n3", "rack1n5", "rack2n3", "rack2n5"]),
        ("a-b.c,d", ["a-b.c", "d"]),
    ],
)
def test_a_list_of_hosts_is_written_out(nodelist, expected):
    assert hosts(nodelist) == expected


@pytest.mark.parametrize("nodelist", ["", "node[1-", "node[a-b]", "node[]"])
def test_what_is_no_list_of_hosts_is_refused(nodelist):
    with pytest.raises(ValueError, match="SLURM_STEP_NODELIST="):
        hosts(nodelist)


def test_a_process_computes_on_its_own_gpu_and_on_the_only_one_that_srun_shows_it():
    assert read_launch_env(TORCHRUN).device_index(gpus=2) == 1
    assert read_launch_env(SRUN).device_index(gpus=4) == 1
    assert read_launch_env(SRUN).device_index(gpus=1) == 0
    with pytest.raises(ValueError, match="local rank 1 has no GPU, torch sees 1"):
        read_launch_env(TORCHRUN).device_index(gpus=1)
    # Torchrun's four variables set by hand: whose GPU it is must be said as well, unless there is one process.
    by_hand = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_RANK"}
    with pytest.raises(ValueError, match="LOCAL_RANK, which chooses the GPU of a rank, is not set"):
        read_launch_env(by_hand).device_index(gpus=2)
    assert read_launch_env({**by_hand, "RANK": "0", "WORLD_SIZE": "1"}).device_index(gpus=2) == 0


def test_what_torchrun_started_must_be_as_many_as_asked_for(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"trainer.devices=3, but there are 4 ranks"):
        comm.start(accelerator="cpu", devices=3)


def test_a_port_in_use_is_named(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in {**TORCHRUN, "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=f"rank 0 of 4 cannot open 127.0.0.1:{port} for the others: .*; another program may use that port"):
            comm.start(accelerator="cpu", devices=None)
        # It listens, but never answers.
        monkeypatch.setattr(rendezvous, "STORE_TIMEOUT", timedelta(seconds=1))
        monkeypatch.setenv("RANK", "1")
        with pytest.raises(ValueError, match=f"rank 1 of 4 did not find its job at 127.0.0.1:{port}: another program uses that port"):
            comm.start(accelerator="cpu", devices=None)


def test_a_task_whose_sibling_never_comes_gives_up_in_time(monkeypatch):
    monkeypatch.setattr(rendezvous, "JOIN_S", 1.0)
    began = time.monotonic()
    for rank, message in enumerate(("rank 0 of 3 waited 1 s for rank 1, 2, which did not start", "rank 1 of 3 could not connect to 127.0.0.1:.* within 1 s")):
        for name, value in srun_places(3)[rank].items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=message):
            comm.start(accelerator="cpu", devices=None)
    assert time.monotonic() - began < 10


def test_processes_on_different_devices_or_on_one_gpu_do_not_begin():
    def account(device: str, host: str, gpu: str | None = None) -> dict:
        return {"device": device, "host": host, "gpu": gpu}

    rendezvous._check_devices([account("cuda", "a", "1"), account("cuda", "a", "2"), account("cuda", "b", "1")])
    rendezvous._check_devices([account("cpu", "a"), account("cpu", "a")])
    with pytest.raises(ValueError, match=r"different devices: cpu on rank 1 \(b\); cuda on rank 0 \(a\), 2 \(a\)"):
        rendezvous._check_devices([account("cuda", "a", "1"), account("cpu", "b"), account("cuda", "a", "2")])
    with pytest.raises(ValueError, match="ranks 0, 2 share one GPU of a"):
        rendezvous._check_devices([account("cuda", "a", "1"), account("cuda", "a", "2"), account("cuda", "a", "1")])



@pytest.mark.slow
@pytest.mark.parametrize("failing", ["0", "1"])
def test_a_task_that_fails_before_any_collective_ends_the_others_while_they_wait_for_the_data(tmp_path, failing):
    tasks = [start(launched_parts.wait_for_data, failing, output=tmp_path / str(rank), **place) for rank, place in enumerate(srun_places(2))]
    assert [ended(task, 100) for task in tasks] == [1, 1]
    said = [(tmp_path / str(rank)).read_text().splitlines()[-1] for rank in range(2)]
    assert said[int(failing)] == "no data" and said[1 - int(failing)] == "another's fault"


@pytest.mark.parametrize(
    "accelerator,devices,gpus,expected",
    [("auto", None, 0, 1), ("auto", None, 1, 1), ("auto", None, 4, 4), ("auto", 1, 4, 1), ("cuda", 2, 4, 2), ("cpu", None, 4, 1), ("cpu", 3, 4, 3), ("auto", 3, 0, 3)],
)
def test_as_many_processes_start_as_asked_for_or_one_a_gpu(monkeypatch, accelerator, devices, gpus, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert launch.processes_to_start(accelerator, devices) == expected
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert launch.processes_to_start(accelerator, devices) == 1  # torchrun's own work


def test_more_gpus_than_there_are_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"trainer.devices=3, but torch sees 2 GPU\(s\) here"):
        launch.processes_to_start("auto", 3)


def last_line(path: Path) -> str:
    text = path.read_text()
    assert "Traceback" not in text, text
    return text.splitlines()[-1]


def test_tasks_of_srun_that_were_told_different_things_all_end_with_one_line_that_names_the_key(small_videos, tmp_path):
    tasks = [
        start_tool("train", *small_job(small_videos, tmp_path / "run", "trainer.accelerator=cpu", f"optimizer.lr=0.{rank + 1}"), output=tmp_path / str(rank), **place)
        for rank, place in enumerate(srun_places(2))
    ]
    for rank, task in enumerate(tasks):
        assert ended(task) == 1
        assert last_line(tmp_path / str(rank)) == (
            "error: the ranks have different configs: optimizer.lr is 0.1 on rank 0, 0.2 on rank 1; start all of them with the same command"
        )


@pytest.mark.slow
def test_a_task_of_srun_whose_sibling_is_killed_says_so_in_one_line(small_videos, tmp_path):
    """As under an srun without --kill-on-bad-exit."""
    killed = ("optimizer._target_=launched_parts.failing_optimizer", "+optimizer.kind=killed")
    job = Job("train", *small_job(small_videos, tmp_path / "run", "trainer.accelerator=cpu", *killed), processes=2, launcher="srun", output=tmp_path / "said")
    assert job.wait() == [1, -signal.SIGKILL]
    assert last_line(tmp_path / "said").startswith("error: another process of this job ended, see its output")


@pytest.mark.slow
def test_tasks_whose_run_folder_is_not_shared_both_end_with_a_line(small_videos, tmp_path):
    tasks = []
    for rank, place in enumerate(srun_places(2)):
        (tmp_path / str(rank)).mkdir()
        tasks.append(start_tool("train", *small_job(small_videos, Path("run"), "trainer.accelerator=cpu"), cwd=tmp_path / str(rank), output=tmp_path / f"{rank}.txt", **place))
    for rank, task in enumerate(tasks):
        assert ended(task) == 1
        assert last_line(tmp_path / f"{rank}.txt") == (
            "error: rank 1 does not see the run folder run of rank 0: it must be on a disk that all machines share; set trainer.output_dir"
        )
    assert not list(tmp_path.glob("*/run/checkpoints")) and not list(tmp_path.glob("*/run/.seen*"))


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["split"] == "train"]


@pytest.mark.slow
def test_any_number_of_processes_of_any_launcher_learns_what_one_does(small_videos, tmp_path):
    """Over 20 steps of four clips, which three processes do not share evenly."""
    own = ("trainer.accelerator=cpu", "trainer.epochs=10", "trainer.statistics_clips=0", "model=custom", "model.backbone._target_=launched_parts.network")
    launchers = {"alone": {}, "ours": {}, "srun": {"processes": 2, "launcher": "srun"}, "torchrun": {"processes": 3}}
    for name, how in launchers.items():
        also = {"ours": ["trainer.devices=2"], "torchrun": ["trainer.deterministic=true"]}.get(name, [])  # gradients of three are averaged in another way
        overrides = [one for one in small_job(small_videos, tmp_path / name, *own, *also) if one != "model.size=tiny"]
        assert set(Job("train", *overrides, output=tmp_path / f"{name}.txt", **how).wait()) == {0}, (tmp_path / f"{name}.txt").read_text()
        assert (tmp_path / f"{name}.txt").read_text().count("8 training, 4 validation") == 1
    expected = losses(tmp_path / "alone")
    assert len(expected) == 20 and len(set(expected)) == 20
    for name in launchers:
        assert losses(tmp_path / name) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_a_process_that_fails_ends_the_job_with_its_error_once(small_videos, tmp_path):
    failing = ("trainer.accelerator=cpu", "trainer.devices=2", "optimizer._target_=launched_parts.failing_optimizer")
    began = time.monotonic()
    kinds = ("bug", "mistake", "killed")
    jobs = {kind: Job("train", *small_job(small_videos, tmp_path / kind, *failing, f"+optimizer.kind={kind}"), output=tmp_path / f"{kind}.txt") for kind in kinds}
    assert [jobs[kind].wait(120) for kind in kinds] == [[1], [1], [1]]
    bug = (tmp_path / "bug.txt").read_text()
    assert bug.count("Traceback") == 1 and bug.count("RuntimeError: no such thing on rank 1") == 1, bug
    assert last_line(tmp_path / "mistake.txt") == "error: rank 1 was told nonsense"
    assert last_line(tmp_path / "killed.txt") == "error: process 1 was killed by SIGKILL, so the others were ended"
    assert time.monotonic() - began < 150


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_parent_leaves_no_process_behind(small_videos, tmp_path, number):
    job = Job("train", *small_job(small_videos, tmp_path, "trainer.accelerator=cpu", "trainer.devices=2", "trainer.epochs=1000"))
    (parent,) = job.processes
    try:
        while not (tmp_path / "metrics.jsonl").exists():
            assert not job.over()
            time.sleep(0.1)
        children = [int(pid) for pid in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]
        assert len(children) == 2
    finally:
        os.kill(parent.pid, number)
    job.wait(60)
    deadline = time.monotonic() + 20
    while any(runs(pid) for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def runs(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.slow
def test_a_sweep_starts_the_processes_of_each_job_and_keeps_its_run_folders(small_videos, tmp_path):
    overrides = [o for o in small_job(small_videos, tmp_path, "model=x3d", "trainer.max_steps=1", "trainer.test=false") if "output_dir" not in o]
    sweep = start_tool("train", "-m", *overrides, "trainer.accelerator=cpu", "trainer.devices=2", "trainer.seed=0,1", cwd=tmp_path, output=tmp_path / "said")
    assert ended(sweep) == 0, (tmp_path / "said").read_text()
    folders = [path.parent.parent for path in tmp_path.glob("runs/sweep/*/checkpoints/last.pt")]
    assert len(folders) == 2 and sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["sweep"]
    said = (tmp_path / "said").read_text()
    assert said.count("run folder runs/sweep/") == 2 and all(f"run folder runs/sweep/{folder.name}\n" in said for folder in folders)


def test_a_job_of_submitit_that_fails_exits_since_an_exception_would_pass_for_a_good_end(monkeypatch, capsys):
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    outcome = run_tool("train", "-m", "trainer.epochs=0,-1")
    assert outcome.code == 1 and outcome.err.splitlines() == ["error: trainer.epochs must be at least 1, not 0"]

    @configuration.one_line_errors
    def main(config):
        raise KeyError("a bug")

    with pytest.raises(SystemExit, match="1"):
        main(OmegaConf.create())
    err = capsys.readouterr().err
    assert err.count("Traceback") == 1 and "KeyError: 'a bug'" in err


def test_the_slurm_launcher_starts_a_task_a_gpu_and_queues_again_what_ran_out_of_time():
    pytest.importorskip("submitit")
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        composed = compose("train", ["hydra/launcher=slurm", "hydra.launcher.nodes=2", "hydra.launcher.gpus_per_node=4"], return_hydra_config=True)
    options = composed.hydra.launcher
    assert (options.nodes, options.gpus_per_node, options.tasks_per_node) == (2, 4, 4)
    assert options.timeout_min > 10 and options.max_num_timeout >= 1 and "export SLURM_KILL_BAD_EXIT=1" in options.setup


def test_the_batch_script_hands_the_overrides_to_every_task(tmp_path):
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\necho "$OMP_NUM_THREADS $SRUN_CPUS_PER_TASK"; for one in "$@"; do echo "$one"; done; exit 3\n')
    srun.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "6"}
    done = subprocess.run(["bash", ROOT / "scripts/slurm/train.sbatch", "model=x3d", "a=b c"], env=environment, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert done.stdout.splitlines() == ["6 6", "--kill-on-bad-exit=1", "python", "tools/train.py", "model=x3d", "a=b c"]
