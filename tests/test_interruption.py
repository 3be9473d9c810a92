"""A training that is told to stop saves at the next step, and the same command ends as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from run_tools import small_job
from test_kill import family, logged, wait_for_steps
from test_kill import start as start_training

from atfr.engine import checkpoint
from atfr.engine.interruption import TRY_AGAIN, Interrupted, end, listening

MORE = ("trainer.batch_size=2", "trainer.epochs=6", "trainer.eval_every=6", "trainer.test=false", "trainer.workers=1")


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
    before = signal.getsignal(signal.SIGUSR1)
    with listening() as flag:
        assert flag.signal is None
        os.kill(os.getpid(), getattr(signal, number))
        assert flag.signal.name == number
    assert signal.getsignal(signal.SIGUSR1) == before
    with pytest.raises(SystemExit) as ended:
        end(Interrupted(flag.signal, "somewhere"), is_main=True)
    assert ended.value.code == code
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else None) == ("requeue 17\n" if number == "SIGUSR1" else None)
    assert ("scontrol requeue 17: no such job" in capsys.readouterr().err) == bool(answer)
