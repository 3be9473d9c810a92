"""The lock of a run folder: one job at a time, also on a shared disk, and a dead job's lock is taken over."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Iterator

import pytest
from run_tools import ROOT

from atfr.engine.distributed.preemption import StopFlag
from atfr.engine.run import run_lock as module
from atfr.engine.run.run_lock import NAME, Holder, RunLock, run_lock

HOLD = """
import sys
from pathlib import Path
from atfr.engine.run import run_lock as module
module.BEAT_S = 0.05
with module.run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
ELSEWHERE = replace(module._this_process(), host="elsewhere", pid=7, machine="another boot", token="theirs")


@contextmanager
def job(folder: Path) -> Iterator[subprocess.Popen]:
    """A process that holds the lock of a folder until its stdin is closed."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], **pipes, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        assert process.stdout.readline() == "held\n", process.stderr.read()
        yield process
    finally:
        process.kill()
        process.communicate()


def write(folder: Path, holder: Holder, *, age: float = 0.0, more: str = "") -> None:
    """A lock file of another job, last updated `age` seconds ago."""
    path = folder / NAME
    path.write_text(json.dumps(asdict(holder)) + "\n" + more)
    now = time.time()
    os.utime(path, (now - age, now - age))


def test_a_second_job_is_refused_only_while_the_first_one_runs(tmp_path):
    with job(tmp_path / "run") as first:
        message = rf"another job works in run folder {tmp_path}/run: process {first.pid} on \S+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d; "
        with pytest.raises(ValueError, match=message), run_lock(tmp_path / "run"):
            pass
        first.communicate(timeout=30)
        assert first.returncode == 0
    with run_lock(tmp_path / "run"):
        assert [path.name for path in (tmp_path / "run").iterdir()] == [NAME]
    assert not (tmp_path / "run").exists()


def test_an_empty_new_folder_is_removed_and_errors_release_the_lock(tmp_path):
    with run_lock(tmp_path):
        pass
    assert tmp_path.exists()
    with pytest.raises(RuntimeError), run_lock(tmp_path / "run"):
        (tmp_path / "run/config.yaml").touch()
        raise RuntimeError
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_the_lock_of_a_killed_job_is_taken_over_with_one_warning(tmp_path, caplog, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", refuse_links)
    with job(tmp_path) as first:
        first.kill()
        first.wait()
        with run_lock(tmp_path):
            assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    assert len(caplog.messages) == 1 and f"process {first.pid}" in caplog.text and "taken over" in caplog.text
    assert list(tmp_path.iterdir()) == []


def refuse_links(*_: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def test_a_file_system_without_hard_links_refuses_a_second_job_too(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", refuse_links)
    with run_lock(tmp_path), pytest.raises(ValueError, match="another job works"), run_lock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_another_process_with_the_pid_of_the_dead_holder_is_not_mistaken_for_it(tmp_path):
    write(tmp_path, replace(module._this_process(), started="1", token="theirs"))  # this very process, which started later
    with run_lock(tmp_path):
        pass


def test_a_job_on_another_machine_is_dead_after_a_while_without_an_update(tmp_path, caplog):
    write(tmp_path, ELSEWHERE, age=module.DEAD_S + 10)
    with run_lock(tmp_path):
        assert "process 7 on elsewhere" in caplog.text


@pytest.mark.parametrize("off", [-86400.0, 86400.0])
def test_a_running_job_is_not_counted_as_dead_if_the_clocks_of_the_machines_differ(tmp_path, monkeypatch, off):
    now = time.time
    with job(tmp_path) as first:
        theirs = json.loads((tmp_path / NAME).read_text())
        (tmp_path / NAME).write_text(json.dumps({**theirs, "machine": "another boot"}) + "\n")  # the same file: it is kept up to date
        monkeypatch.setattr(time, "time", lambda: now() + off)
        with pytest.raises(ValueError, match=f"process {first.pid} on"), run_lock(tmp_path):
            pass


def test_a_silent_job_on_another_machine_is_watched_until_it_counts_as_dead(tmp_path, monkeypatch, caplog):
    write(tmp_path, ELSEWHERE)
    looks = []

    def look(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:  # time passes
            write(tmp_path, ELSEWHERE, age=module.DEAD_S + 10)

    monkeypatch.setattr(time, "sleep", look)
    with run_lock(tmp_path):
        assert len(looks) == 3
    assert ["waiting for its end" in message for message in caplog.messages] == [True, False]


def test_a_job_waits_for_a_holder_that_is_stopping(tmp_path, monkeypatch):
    stop = StopFlag()
    first = RunLock(tmp_path, stop)
    first.acquire()
    stop.signal = signal.SIGTERM
    deadline = time.monotonic() + 20
    while module.ENDING not in (tmp_path / NAME).read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    sleep, looks = time.sleep, []

    def look(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            first.release()
        sleep(0.01)

    monkeypatch.setattr(time, "sleep", look)
    with run_lock(tmp_path):
        assert len(looks) == 3


@pytest.mark.parametrize("job_id,restart,waits", [("17", "1", True), ("17", "0", False), ("18", "1", False)])
def test_a_requeued_slurm_job_waits_for_its_own_predecessor_only(tmp_path, monkeypatch, job_id, restart, waits):
    monkeypatch.setenv("SLURM_JOB_ID", job_id)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
    monkeypatch.setattr(time, "sleep", lambda seconds: (tmp_path / NAME).unlink())  # it ends meanwhile
    write(tmp_path, replace(module._this_process(), job="17", restart=0, token="theirs"))
    if waits:
        with run_lock(tmp_path):
            pass
    else:
        with pytest.raises(ValueError, match="another job works"), run_lock(tmp_path):
            pass


def test_waiting_for_a_holder_that_is_stopping_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ENDING_S", 0.5)
    write(tmp_path, replace(module._this_process(), token="theirs"), more=module.ENDING)
    with pytest.raises(ValueError, match="another job works"), run_lock(tmp_path):
        pass


def test_the_lock_of_a_job_that_died_while_taking_over_is_taken_over(tmp_path):
    dead = replace(module._this_process(), started="1")
    write(tmp_path, replace(dead, token="first"))
    (tmp_path / f"{NAME}.after-first").write_text(json.dumps(asdict(replace(dead, token="second"))) + "\n")
    with run_lock(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_damaged_lock_file_counts_as_held_until_it_is_old(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "DEAD_S", 0.5)
    (tmp_path / NAME).write_text("")
    with run_lock(tmp_path):
        pass


@pytest.mark.parametrize("dead", [False, True], ids=["no lock", "a dead job's lock"])
def test_exactly_one_of_many_simultaneous_jobs_gets_the_lock(tmp_path, dead):
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        if dead:
            write(folder, replace(module._this_process(), started="1", token="theirs"))
        start, begin = os.pipe()
        end, finish = os.pipe()
        children = {fork_racer(folder, start, end, (begin, finish)) for _ in range(6)}
        os.close(begin)
        lost = [os.wait() for _ in range(5)]  # the winner works until all others have ended
        assert [os.waitstatus_to_exitcode(status) for _, status in lost] == [3] * 5
        os.close(finish)
        assert os.waitpid(*(children - {child for child, _ in lost}), 0)[1] == 0
        assert list(folder.iterdir()) == []
        os.close(start)
        os.close(end)


def fork_racer(folder: Path, start: int, end: int, others: tuple[int, int]) -> int:
    """A process that tries to take the lock when `start` is closed, and releases it when `end` is, or after a minute."""
    child = os.fork()
    if child:
        return child
    signal.alarm(60)
    code = 9
    try:
        for descriptor in others:
            os.close(descriptor)
        os.read(start, 1)
        with run_lock(folder):
            os.read(end, 1)
        code = 0
    except ValueError:
        code = 3
    finally:
        os._exit(code)


def test_a_suspended_job_ends_when_another_one_has_taken_over(tmp_path):
    with job(tmp_path) as first:
        (tmp_path / "theirs").write_text(json.dumps(asdict(ELSEWHERE)))
        os.replace(tmp_path / "theirs", tmp_path / NAME)
        first.wait(timeout=30)
        assert first.returncode == 1 and first.stderr.read() == f"error: another job has taken over run folder {tmp_path}, see {tmp_path}/{NAME}; this job ends\n"
    assert json.loads((tmp_path / NAME).read_text())["token"] == "theirs"
