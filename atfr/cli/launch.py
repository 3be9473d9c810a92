"""Run a program's work on every process of a launcher, or start the processes.

Without a launcher, torch's elastic launcher starts `trainer.devices` processes (null: one for each visible GPU) on
this machine. They run the same program with the same overrides.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import signal
import sys
import tempfile
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import Callable

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from atfr.cli.command.arguments import quoted
from atfr.cli.command.errors import CLOSED_PIPE, JobFailed, as_text, output_is_closed
from atfr.cli.command.run_name import in_sweep
from atfr.engine.determinism import choose_algorithms, explaining_what_is_not_deterministic
from atfr.engine.distributed import comm
from atfr.engine.distributed.comm import DistInfo
from atfr.engine.distributed.launch_env import read_launch_env
from atfr.engine.distributed.preemption import FROM_BATCH_SYSTEM, SAME_SIGNAL_S, TRY_AGAIN, Interrupted, StopFlag, end, handled_signals
from atfr.engine.run.run_lock import run_lock
from atfr.engine.settings import TrainerSettings

PARENT, ERRORS = "ATFR_PARENT", "ATFR_ERRORS"  # a started process's parent, and the folder of its file: empty, or why it failed
SIGNAL_FILE = "signal"  # the file in that folder with the signal that was received


def on_every_process(
    work: Callable[[DistInfo], None],
    config: DictConfig,
    settings: TrainerSettings,
    *,
    program: str,
    folder: Path,
    stop: StopFlag,
    where: str,
    alone: bool = False,
) -> None:
    """Call `work` on every process with its ranks, after all have connected and compared their configs.

    An error in one of several ends its process at once, with exit code 1, so that its launcher ends the others. A
    signal ends the program at once, as `preemption.end` does, except where `work` checks the flag itself.

    Args:
        program: the file to run in the processes that are started here.
        folder: the run folder, which in a sweep does not follow from the overrides of a process alone.
        where: what the program is doing, for the message when a signal ends it.
        alone: raise an error if another job works in the folder (`run_lock`).
    """

    def with_lock(dist_info: DistInfo) -> None:
        if alone:
            comm.require_shared(folder, dist_info)
        with run_lock(folder, stop) if alone and dist_info.is_main else nullcontext():
            work(dist_info)

    try:
        with stop.raises_immediately(where):
            _on_every_process(with_lock, config, settings, program=program, folder=folder)
    except Interrupted as error:
        comm.stop()
        end(error, is_main=read_launch_env(os.environ).rank == 0)


def _on_every_process(work: Callable[[DistInfo], None], config: DictConfig, settings: TrainerSettings, *, program: str, folder: Path) -> None:
    choose_algorithms(deterministic=settings.deterministic, tf32=settings.tf32)
    count = processes_to_start(settings.accelerator, settings.devices)
    if count > 1:
        start_processes(count, program, folder, on_gpus=comm.uses_gpu(settings.accelerator))
        return
    answer_to_the_parent()
    try:
        dist_info = comm.start(accelerator=settings.accelerator, devices=settings.devices)
        comm.require_same(OmegaConf.to_container(config), of="configs", remedy="start all of them with the same command")
        with explaining_what_is_not_deterministic():
            work(dist_info)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and output_is_closed():
            sys.exit(CLOSED_PIPE)
        if read_launch_env(os.environ).launcher == "none":
            raise
        # Leaving the process group could wait forever, so exit without it.
        text = as_text(error)
        if comm.is_others_fault(error) and os.environ.get("ATFR_TRACEBACK") != "1":
            reason = str(error).strip().splitlines()
            text = "error: another process of this job ended, see its output" + (f", or cannot be reached: {reason[0]}" if reason else "")
        comm.tell_failure()
        if ERRORS in os.environ:
            Path(os.environ[ERRORS], str(os.getpid())).write_text(text, errors="backslashreplace")
        else:
            print(text, file=sys.stderr, flush=True)
        sys.exit(1)
    comm.stop()


def processes_to_start(accelerator: str, devices: int | None) -> int:
    """Return how many processes to start here; 1 if this process does the work, alone or under a launcher.

    Raises:
        ValueError: `accelerator` or `devices` is impossible.
    """
    if devices is not None and devices < 1:
        raise ValueError(f"trainer.devices={devices} must be at least 1, or null for every GPU")
    if read_launch_env(os.environ).launcher != "none":
        return 1
    if not comm.uses_gpu(accelerator):
        return devices or 1
    gpus = torch.cuda.device_count()
    if devices is not None and devices > gpus:
        raise ValueError(f"trainer.devices={devices}, but torch sees {gpus} GPU(s) here; ask for fewer, or set trainer.accelerator=cpu")
    return devices or gpus


def start_processes(count: int, program: str, folder: Path, *, on_gpus: bool) -> None:
    """Run the program in `count` processes on this machine. The first error stops all of them and is printed once."""
    hydra = HydraConfig.get()
    # A job of a sweep has its own overrides, and these alone would give another run folder.
    arguments = [*hydra.overrides.task, f"trainer.output_dir={quoted(str(folder))}"] if in_sweep() else sys.argv[1:]
    before, handlers, disabled = dict(os.environ), {s: signal.getsignal(s) for s in signal.valid_signals()}, logging.root.manager.disable
    with tempfile.TemporaryDirectory(prefix="atfr-") as logs, tempfile.TemporaryDirectory(prefix="atfr-") as errors:
        os.environ.update({PARENT: str(os.getpid()), ERRORS: errors})
        if not on_gpus:  # when a process exits, torch logs a stack for each of its peers. With GPUs keep it: NCCL reports errors only there
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
        logging.disable(logging.CRITICAL)  # torch's report of a failure, which is longer than ours
        passed_on = pass_on_signals(Path(errors))
        try:
            elastic_launch(
                LaunchConfig(
                    min_nodes=1,
                    max_nodes=1,
                    nproc_per_node=count,
                    run_id=str(os.getpid()),
                    rdzv_backend="c10d",
                    rdzv_endpoint="localhost:0",
                    local_addr="localhost",
                    max_restarts=0,
                    logs_specs=DefaultLogsSpecs(log_dir=logs),
                    signals_to_handle="SIGQUIT",  # for other signals the launcher gives the processes only 30 s to save
                ),
                sys.executable,
            )(program, *arguments)
        except ChildFailedError as error:
            if passed_on:
                saved = any(failure.exitcode == TRY_AGAIN for failure in error.failures.values())
                sys.exit(TRY_AGAIN if saved else 128 + passed_on[0])
            if any(failure.exitcode == CLOSED_PIPE for failure in error.failures.values()):
                sys.exit(CLOSED_PIPE)
            text = first_error(Path(errors), error)
            print(text, file=sys.stderr, flush=True)
            if in_sweep() and "SUBMITIT_EXECUTOR" not in os.environ:
                raise JobFailed(text) from None  # the other jobs of the sweep still run
            sys.exit(1)
        except SignalException as stopped:
            sys.exit(128 + stopped.sigval)
        finally:
            logging.disable(disabled)
            os.environ.clear()
            os.environ.update(before)
            for number, handler in handlers.items():
                if handler is not None and signal.getsignal(number) is not handler:
                    signal.signal(number, handler)


def pass_on_signals(folder: Path) -> list[int]:
    """Forward stop signals to the started processes, each of which has a file in the folder; return the list of received signals.

    A process that has none yet finds the signal in the file `SIGNAL_FILE`.
    """
    came: list[int] = []
    first = math.inf

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        came.append(number)
        first = min(first, time.monotonic())
        (folder / SIGNAL_FILE).write_text(str(number))
        processes = _files(folder)
        for path in processes:
            with suppress(ProcessLookupError):
                os.kill(int(path.name), number)  # which ends it at once, if it is the second
        if not processes and number not in FROM_BATCH_SYSTEM and time.monotonic() - first > SAME_SIGNAL_S:
            os._exit(128 + number)

    for number in handled_signals():
        signal.signal(number, handle)
    return came


def first_error(folder: Path, error: ChildFailedError) -> str:
    """Return the error of the process that failed first. A killed process leaves no error; SIGTERM is the launcher stopping the rest."""
    killed = [(rank, failure) for rank, failure in error.failures.items() if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM]
    said = sorted((path for path in _files(folder) if path.stat().st_size), key=lambda path: path.stat().st_mtime_ns)
    if said and not killed:
        return said[0].read_text()
    rank, failure = (killed or [error.get_first_failure()])[0]
    how = f"was killed by {failure.signal_name()}" if failure.exitcode < 0 else f"ended with exit code {failure.exitcode}"
    return f"error: process {rank} {how}, so the others were ended"


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name != SIGNAL_FILE]


def answer_to_the_parent() -> None:
    """Let the kernel kill this process when its parent exits, and create the file that tells the parent about it."""
    if PARENT not in os.environ:
        return
    if sys.platform.startswith("linux"):
        set_parent_death_signal = 1  # of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != int(os.environ[PARENT]):  # the parent had already exited
        sys.exit(1)
    folder = Path(os.environ[ERRORS])
    (folder / str(os.getpid())).touch()
    with suppress(FileNotFoundError, ValueError):  # ValueError: it is being written, and its writer will see our file
        os.kill(os.getpid(), int((folder / SIGNAL_FILE).read_text()))
