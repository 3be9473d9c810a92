"""A training that is told to stop saves at the next step, and the same command ends as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from run_tools import ROOT, run_tool, small_job
from test_kill import family, logged, wait_for_steps
from test_kill import start as start_training

from atfr import jobs
from atfr.engine import checkpoint
from atfr.engine.distributed import Ranks
from atfr.engine.evaluate import LOOK_EVERY, evaluate
from atfr.engine.interruption import SIGNALS, TRY_AGAIN, Interrupted, end, listen

MORE = ("trainer.batch_size=2", "trainer.epochs=6", "trainer.eval_every=6", "trainer.test=false", "trainer.workers=1")


@pytest.fixture(autouse=True)
def _own_handlers():
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.slow
@pytest.mark.parametrize("processes,launcher,number", [(1, "none", signal.SIGUSR1), (1, "none", signal.SIGTERM), (2, "ours", signal.SIGTERM), (2, "torchrun", signal.SIGUSR2)])
def test_a_signal_saves_at_the_next_step_and_the_same_command_goes_on_from_there(small_videos, tmp_path, processes, launcher, number):
    def start(folder: Path) -> subprocess.Popen:
        own = [f"trainer.devices={processes}"] if launcher == "ours" else []
        return start_training(processes if launcher == "torchrun" else 1, small_job(small_videos, folder, "trainer.accelerator=cpu", *own, *MORE))

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(whole).wait(timeout=300) == 0
    job = start(broken)
    wait_for_steps(broken, 2, job)
    # torchrun, which is the first of the family, would take it for a failure: one of its two processes is told.
    told = job.pid if launcher != "torchrun" else next(pid for pid in family(job.pid) if is_rank_1(pid))
    os.kill(told, number)
    code = job.wait(timeout=120)
    assert code == TRY_AGAIN if launcher != "torchrun" else code != 0
    stopped = checkpoint.load(broken / "checkpoints/last.pt")["step"]
    assert 2 <= stopped < 24 and stopped == len(logged(broken)["train"]), "it saved nowhere but at the end of an epoch"
    assert start(broken).wait(timeout=300) == 0
    first, second = (checkpoint.load(folder / "checkpoints/last.pt")["model"] for folder in (whole, broken))
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


def is_rank_1(pid: int) -> bool:
    with open(f"/proc/{pid}/environ", "rb") as file:
        variables = file.read().split(b"\0")
    with open(f"/proc/{pid}/stat") as file:
        parent = int(file.read().rsplit(")", 1)[1].split()[1])
    with open(f"/proc/{parent}/environ", "rb") as file:
        inherited = b"RANK=1" in file.read().split(b"\0")  # a loader's worker
    return b"RANK=1" in variables and not inherited


@pytest.mark.parametrize("number,answer,code", [("SIGUSR1", 0, 0), ("SIGUSR1", 1, TRY_AGAIN), ("SIGTERM", 0, TRY_AGAIN)])
def test_a_slurm_job_is_put_back_into_the_queue_unless_it_was_cancelled(tmp_path, monkeypatch, capsys, number, answer, code):
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\necho "no such job" >&2\nexit {answer}\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    flag = listen()
    assert flag.signal is None and listen() is flag
    os.kill(os.getpid(), getattr(signal, number))
    assert flag.signal.name == number
    with pytest.raises(SystemExit) as ended:
        end(Interrupted(flag.signal, "somewhere"), is_main=True)
    assert ended.value.code == code
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else None) == ("requeue 17\n" if number == "SIGUSR1" else None)
    assert ("scontrol requeue 17: no such job" in capsys.readouterr().err) == bool(answer)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_while_programs_are_still_importing_ends_them_as_one_while_training_does(small_videos, tmp_path, processes):
    command = [sys.executable, str(ROOT / "tools/train.py"), *small_job(small_videos, tmp_path / "run", "trainer.accelerator=cpu", f"trainer.devices={processes}")]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    # One: once it listens, which it does first of all. Two: once both are there, which then have all their imports to do.
    while not (listens(job.pid) if processes == 1 else len(family(job.pid)) > 2):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    job.send_signal(signal.SIGUSR1)
    _, err = job.communicate(timeout=60)
    assert job.returncode == TRY_AGAIN and "stopped by SIGUSR1 before training; the same command goes on" in err and "Traceback" not in err, err
    assert not (tmp_path / "run/checkpoints").exists()


def listens(pid: int) -> bool:
    """Whether a process handles USR1."""
    (mask,) = [line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt:")]
    return bool(int(mask, 16) >> (signal.SIGUSR1 - 1) & 1)


@pytest.mark.parametrize("how", ["waiting", "broken"])
def test_a_signal_while_data_are_generated_is_not_waited_with(small_videos, tmp_path, monkeypatch, how):
    def generate(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        if how == "waiting":
            time.sleep(60)
        raise RuntimeError("the signal has also ended the processes that generate")

    monkeypatch.setattr(jobs, "load_source", generate)
    if how == "broken":  # noticed before the signal is
        monkeypatch.setattr(os, "kill", lambda pid, number: setattr(listen(), "signal", signal.Signals(number)))
    outcome = run_tool("train", *small_job(small_videos, tmp_path))
    assert outcome.code == TRY_AGAIN and outcome.err.splitlines()[-1] == "stopped by SIGTERM before training; the same command goes on", outcome.err


def test_a_signal_ends_a_test_within_a_few_batches_and_the_statistics_before_the_next_one(small_videos, tmp_path, monkeypatch):
    flag, seen = listen(), []

    class Loader(list):
        def __iter__(self):
            for number in range(100):
                seen.append(number)
                if number == 5:
                    os.kill(os.getpid(), signal.SIGUSR2)
                yield Unread

    class Unread:
        failed, clips = {"bad.mp4": "no video"}, None

    with pytest.raises(Interrupted, match="stopped by SIGUSR2 during the test"):
        evaluate(torch.nn.Identity(), Loader([None] * 100), normalise=torch.nn.Identity(), ranks=Ranks(0, 1, torch.device("cpu")), stop=flag)
    assert len(seen) <= 5 + LOOK_EVERY + 1

    from atfr.engine import train

    original = train.clips_for_statistics

    def told(batches, settings):
        clips = original(batches, settings)
        flag.signal = signal.SIGUSR1
        return clips

    flag.signal = None
    monkeypatch.setattr(train, "clips_for_statistics", told)
    outcome = run_tool("train", *small_job(small_videos, tmp_path))
    assert outcome.code == TRY_AGAIN and "stopped by SIGUSR1 in the statistics after step 0" in outcome.err, outcome.err


def test_a_second_term_ends_a_process_whose_main_thread_waits_for_ever():
    """A mutex locked twice stands for a collective whose other side is gone: no signal gets through to Python there."""
    script = (
        "import ctypes; from atfr.engine.interruption import listen; flag = listen(); lock = ctypes.create_string_buffer(64); libc = ctypes.CDLL(None);"
        "print('ready', flush=True); libc.pthread_mutex_lock(lock); libc.pthread_mutex_lock(lock)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    process.terminate()  # at the same moment: as a batch system and a parent tell it
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1.5)
    process.terminate()
    assert process.wait(timeout=5) == 128 + signal.SIGTERM
