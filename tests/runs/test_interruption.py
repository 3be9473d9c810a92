"""A signal makes a training save after the current step. The same command then ends with the same weights."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator

import pytest
import torch
from forked import Job
from logged_steps import logged, wait_for_steps
from run_tools import ROOT, run_tool, small_job

from atfr.cli import builders
from atfr.data.types import Unreadable
from atfr.engine import trainer
from atfr.engine.distributed import preemption
from atfr.engine.distributed.comm import DistInfo
from atfr.engine.distributed.preemption import SIGNALS, TRY_AGAIN, Interrupted, StopFlag, end, listen
from atfr.engine.evaluator import STOP_EVERY, evaluate
from atfr.engine.run import checkpoint

MORE = ("trainer.batch_size=2", "trainer.epochs=6", "trainer.eval_every=6", "trainer.test=false", "trainer.workers=1", "trainer.accelerator=cpu")


@pytest.fixture(scope="module")
def whole(small_videos, tmp_path_factory):
    """The weights of a training without a signal, by its number of ranks."""
    folders = {processes: tmp_path_factory.mktemp("whole") for processes in (1, 2)}
    builders = {processes: Job("train", *small_job(small_videos, folder, *MORE), processes=processes) for processes, folder in folders.items()}
    assert {code for job in builders.values() for code in job.wait()} == {0}
    return {processes: checkpoint.load(folder / "checkpoints/last.pt")["model"] for processes, folder in folders.items()}


@pytest.mark.slow
@pytest.mark.parametrize("processes,number", [(1, signal.SIGUSR1), (1, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGUSR2)])
def test_a_signal_saves_after_the_step_and_the_same_command_resumes_there(small_videos, tmp_path, whole, processes, number):
    training = small_job(small_videos, tmp_path, *MORE)
    job = Job("train", *training, processes=processes, output=tmp_path / "said")
    wait_for_steps(tmp_path, 2, job)
    told = job.processes[-1].pid  # a signal to one of two is enough
    for pid in family(told) if number == signal.SIGINT else [told]:  # a terminal sends it to the loader workers too
        os.kill(pid, number)
    assert set(job.wait()) == {TRY_AGAIN}
    said = (tmp_path / "said").read_text()
    assert said.count("stopped by") == 1 and f"stopped by {number.name} after step" in said and "Traceback" not in said, said
    check_stopped_and_finish(training, tmp_path, whole[processes], processes)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_parent_passes_a_signal_on_to_the_ranks_that_it_started(small_videos, tmp_path, whole, number):
    training = small_job(small_videos, tmp_path, *MORE)
    job = Job("train", *training, "trainer.devices=2", output=tmp_path / "said")
    wait_for_steps(tmp_path, 2, job)
    for pid in [job.processes[0].pid] if number == signal.SIGTERM else family(job.processes[0].pid):  # said once, though each rank receives it twice
        os.kill(pid, number)
    assert job.wait() == [TRY_AGAIN]
    said = (tmp_path / "said").read_text()
    assert said.count(f"stopped by {number.name} after step") == 1 and "Traceback" not in said, said
    check_stopped_and_finish(training, tmp_path, whole[2], 2)


def check_stopped_and_finish(training: list[str], folder: Path, whole: dict[str, torch.Tensor], processes: int) -> None:
    stopped = checkpoint.load(folder / "checkpoints/last.pt")["step"]
    assert 2 <= stopped < 24 and stopped == len(logged(folder)["train"]), "it saved nowhere but at the end of an epoch"
    assert set(Job("train", *training, processes=processes).wait()) == {0}
    torch.testing.assert_close(checkpoint.load(folder / "checkpoints/last.pt")["model"], whole, rtol=0, atol=0, equal_nan=True)


def family(pid: int) -> list[int]:
    """List a process and its descendants, also those in other sessions, which torchrun starts."""
    try:
        children = [number for task in os.listdir(f"/proc/{pid}/task") for number in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        children = []
    return [pid, *(member for number in children for member in family(int(number)))]


@pytest.mark.parametrize("number,answer,code", [("SIGUSR1", 0, 0), ("SIGUSR1", 1, TRY_AGAIN), ("SIGTERM", 0, TRY_AGAIN)])
def test_a_slurm_job_is_requeued_unless_it_was_cancelled(tmp_path, monkeypatch, capsys, number, answer, code):
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


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_during_the_imports_ends_the_program_like_one_during_training(small_videos, tmp_path, processes):
    command = [sys.executable, str(ROOT / "tools/train.py"), *small_job(small_videos, tmp_path / "run", "trainer.accelerator=cpu", f"trainer.devices={processes}")]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    # One: once it listens, which it does first of all. Two: once both are there, which then have all their imports to do.
    while not (listens(job.pid) if processes == 1 else len(family(job.pid)) > 2):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    job.send_signal(signal.SIGUSR1)
    _, err = job.communicate(timeout=60)
    assert job.returncode == TRY_AGAIN and "stopped by SIGUSR1 before training; run the same command again to continue" in err and "Traceback" not in err, err
    assert not (tmp_path / "run/checkpoints").exists()


def listens(pid: int) -> bool:
    """Whether a process handles USR1."""
    (mask,) = [line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt:")]
    return bool(int(mask, 16) >> (signal.SIGUSR1 - 1) & 1)


@pytest.mark.parametrize("how", ["waiting", "broken"])
def test_a_signal_ends_the_generation_of_data_immediately(small_videos, tmp_path, monkeypatch, how):
    def generate(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        if how == "waiting":
            time.sleep(60)
        raise RuntimeError("the signal has also ended the processes that generate")

    monkeypatch.setattr(builders, "load_source", generate)
    if how == "broken":  # noticed before the signal is
        monkeypatch.setattr(os, "kill", lambda pid, number: setattr(listen(), "signal", signal.Signals(number)))
    outcome = run_tool("train", *small_job(small_videos, tmp_path))
    assert outcome.code == TRY_AGAIN and outcome.err.splitlines()[-1] == "stopped by SIGTERM before training; run the same command again to continue", outcome.err


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
        failed, clips = (Unreadable(0, "bad.mp4", "no video"),), None

    with pytest.raises(Interrupted, match="stopped by SIGUSR2 during the test"):
        evaluate(torch.nn.Identity(), Loader([None] * 100), normalise=torch.nn.Identity(), dist_info=DistInfo(0, 1, torch.device("cpu")), stop=flag)
    assert len(seen) <= 5 + STOP_EVERY + 1

    original = trainer.clips_for_statistics

    def told(batches, settings):
        clips = original(batches, settings)
        flag.signal = signal.SIGUSR1
        return clips

    flag.signal = None
    monkeypatch.setattr(trainer, "clips_for_statistics", told)
    outcome = run_tool("train", *small_job(small_videos, tmp_path))
    assert outcome.code == TRY_AGAIN and "stopped by SIGUSR1 in the statistics after step 0" in outcome.err, outcome.err


@pytest.fixture
def script() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a program and waits until it has printed a line. Programs that a failed test leaves are killed."""
    started: list[subprocess.Popen] = []

    def start(text: str, *, before: Callable[[], None] | None = None, **options: Any) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", text], stdout=subprocess.PIPE, text=True, preexec_fn=before, env={**os.environ, "PYTHONPATH": str(ROOT)}, **options
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_second_signal_ends_a_process_whose_main_thread_is_blocked(script):
    """A mutex locked twice blocks Python's signal handlers, like a collective whose other ranks are gone."""
    process = script(
        "import ctypes; from atfr.engine.distributed.preemption import listen; flag = listen(); lock = ctypes.create_string_buffer(64); libc = ctypes.CDLL(None);"
        "print('ready', flush=True); libc.pthread_mutex_lock(lock); libc.pthread_mutex_lock(lock)"
    )
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # at the same moment: as a batch system and a parent tell it
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 128 + signal.SIGTERM


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_second_one_if_it_comes_more_than_a_second_after_the_first(monkeypatch, number):
    now, ended, flag = [100.0], [], StopFlag()
    monkeypatch.setattr(preemption, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(os, "_exit", ended.append)
    for seconds in (0, 0.5, 0.5):
        now[0] += seconds
        flag._came(number)
    assert ended == []
    now[0] += 0.5
    flag._came(number)
    assert ended == ([] if number in (signal.SIGUSR1, signal.SIGUSR2) else [128 + number])


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(script, number):
    """As under `nohup`, or in the background of a script."""
    process = script(
        "from atfr.engine.distributed.preemption import listen; flag = listen(); print('ready', flush=True); input(); print(flag.signal)",
        before=lambda: signal.signal(number, signal.SIG_IGN),
        stdin=subprocess.PIPE,
    )
    process.send_signal(number)
    out, _ = process.communicate("\n", timeout=30)
    assert out == "None\n" and process.returncode == 0


def test_a_program_still_saves_after_its_terminal_was_closed(script, tmp_path):
    ours, theirs = pty.openpty()
    process = script(
        "import os, sys, time; from atfr.engine.distributed.preemption import Interrupted, end, listen; flag = listen(); print('ready', flush=True); os.dup2(2, 1)\n"
        "while flag.signal is None: \n try: print('step', flush=True); time.sleep(0.01)\n except OSError: pass  # before the signal has arrived\n"
        f"time.sleep(0.2); print('one more', flush=True); open({str(tmp_path / 'saved')!r}, 'w').close(); end(Interrupted(flag.signal, 'now'), is_main=True)",
        before=lambda: (os.setsid(), fcntl.ioctl(2, termios.TIOCSCTTY, 0), signal.signal(signal.SIGHUP, signal.SIG_DFL)),  # which nohup ignores
        stderr=theirs,
    )
    os.close(theirs)
    os.read(ours, 1)
    os.close(ours)  # the terminal is gone
    process.wait(timeout=30)
    assert (tmp_path / "saved").exists() and process.returncode == TRY_AGAIN


@pytest.fixture(scope="module")
def trained(small_videos, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    assert run_tool("train", *small_job(small_videos, folder, "trainer.max_steps=1", "trainer.test=false")).code == 0
    return folder


@pytest.mark.parametrize("place", ["load_source", "gflops_table"])
def test_ctrl_c_ends_a_test_immediately_and_says_how_to_continue(trained, monkeypatch, place):

    def told(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(20)

    monkeypatch.setattr(builders, place, told)
    outcome = run_tool("test", f"checkpoint={trained}/checkpoints/best.pt")
    where = {"load_source": "before the test", "gflops_table": "during the test"}[place]
    assert outcome.code == TRY_AGAIN and outcome.err == f"stopped by SIGINT {where}; run the same command again to continue\n"
    assert not (trained / "results.json").exists()


@pytest.mark.parametrize(
    "error,raised", [(OSError("full"), OSError), (FloatingPointError(), FloatingPointError), (KeyError("a bug"), KeyError), (ChildProcessError(), Interrupted), (RuntimeError(), Interrupted)]
)
def test_a_signal_hides_only_errors_that_the_end_of_another_process_causes(error, raised):
    flag = StopFlag()
    with pytest.raises(raised), flag.raises_immediately("before training"), flag.only_sets_flag():
        flag._note(signal.SIGTERM, None)
        raise error
