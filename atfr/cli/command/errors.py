"""Print one line on what is wrong with a command and exit with code 1. Exit silently if the output pipe is closed."""

from __future__ import annotations

import functools
import os
import re
import select
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Callable, TextIO

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from atfr.cli.command import suggestions
from atfr.cli.command.run_name import in_sweep, swept_part
from atfr.cli.command.suggestions import did_you_mean, similar, similar_options
from atfr.data.types import VideoError

CLOSED_PIPE = 128 + 13  # exit code of a program that SIGPIPE ended
NULL_CHOICE = "Config group override must be a string"  # hydra's, of GROUP=null


class JobFailed(RuntimeError):
    """A job of a sweep failed. Its error is the text of this exception and has been printed."""


def as_text(error: Exception) -> str:
    """Format an error: one line if the user can fix it, otherwise the traceback.

    With ATFR_TRACEBACK=1 in the environment it is always the traceback.
    """
    fixable = isinstance(error, (ValueError, OSError, FloatingPointError, VideoError, OmegaConfBaseException))
    hint = ""
    if type(error) is RuntimeError and str(error).startswith("DataLoader"):
        hint = "; a video may be stuck or memory short: see trainer.timeout_s and trainer.workers"
    elif isinstance(error, torch.OutOfMemoryError):
        hint = "; run a batch in parts with trainer.accumulate=2 or more, set trainer.checkpoint_activations=true, or lower trainer.batch_size"
    if os.environ.get("ATFR_TRACEBACK") == "1" or not (fixable or hint):
        return "".join(traceback.format_exception(error)).rstrip()
    return f"error: {' '.join(str(error).split())}{hint}"


@dataclass
class JobLog:
    """The number of jobs of a sweep that this process ran, and the failed ones with their reasons."""

    count: int = 0
    failed: list[str] = field(default_factory=list)

    def add_failure(self, reason: str) -> None:
        overrides = swept_part(list(HydraConfig.get().overrides.task))
        self.failed.append(f"#{HydraConfig.get().job.num} {' '.join(overrides)} ({reason})")

    def end(self) -> None:
        """Exit with code 1 and one line if any job failed."""
        if self.failed:
            print(f"error: {len(self.failed)} of {self.count} jobs failed: {'; '.join(self.failed)}", file=sys.stderr, flush=True)
            sys.exit(1)


def one_line_errors(main: Callable[[DictConfig], None], jobs: JobLog | None = None) -> Callable[[DictConfig], None]:
    """Turn errors of `main` into exit code 1 and, if the user can fix them, one line. A sweep continues with its next job."""
    jobs = jobs or JobLog()

    @functools.wraps(main)
    def guarded(config: DictConfig) -> None:
        alone = "SUBMITIT_EXECUTOR" in os.environ  # submitit runs each job of a sweep in its own processes
        sweep = not alone and in_sweep()
        jobs.count += 1
        try:
            main(config)
        except Exception as error:
            if isinstance(error, BrokenPipeError) and output_is_closed():
                sys.exit(CLOSED_PIPE)
            printed = isinstance(error, JobFailed)
            text = str(error) if printed else as_text(error)
            if text.startswith("Traceback") and not (alone or sweep):
                raise  # hydra prints it
            if not printed:
                print(text, file=sys.stderr, flush=True)
            if not sweep:
                # Submitit would report a job that raises as successful.
                sys.exit(1)
            jobs.add_failure(text.splitlines()[-1].removeprefix("error: "))

    return guarded


@contextmanager
def quiet_at_closed_pipe() -> Iterator[None]:
    """Exit silently if the reader of the output has closed it, as in `tools/flops.py ... | head -1`."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not output_is_closed():
            raise
        sys.exit(CLOSED_PIPE)


def output_is_closed() -> bool:
    """Return whether stdout or stderr is a pipe without a reader, and redirect it to /dev/null."""
    closed = [stream.fileno() for stream in (sys.stdout, sys.stderr) if _has_no_reader(stream)]
    for descriptor in closed:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)
    return bool(closed)


def _has_no_reader(stream: TextIO) -> bool:
    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)
    except (OSError, ValueError):  # not a file
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def is_of_the_command(error: Exception) -> bool:
    """Return whether an error comes from the command line or from a submitit job, not from `main`."""
    return isinstance(error, (HydraException, OmegaConfBaseException)) or NULL_CHOICE in str(error) or _is_of_submitit(error)


def explain(error: Exception, config_name: str, arguments: list[str]) -> str:
    """Explain in one line why hydra cannot compose a config from the arguments."""
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        options = list(error.options)
        if group.startswith("experiment"):  # its files are in subfolders
            group, _, name = error.missing_cfg_file.partition("/")
            options = suggestions.choices(group)
        meant = did_you_mean(similar(name, options))
        return f"{group}={name} does not exist{meant or ';'} choose one of {', '.join(options)}"
    lines = str(error).split("See https://")[0].strip().splitlines()
    text = " ".join(" ".join(lines).split())
    if _is_of_submitit(error):
        return f"a job of the sweep failed: {lines[-1].removeprefix('error: ')} ({lines[0]}); other jobs may still run"
    if isinstance(error, OverrideParseException):
        if "=" not in error.override:
            key = {"test": "checkpoint", "export": "checkpoint", "predict": "video", "calibrate": "init_from"}.get(config_name)
            return f"{error.override} is not understood: options are KEY=VALUE{f', such as {key}={error.override}' if key else ''}"
        return f"{error.override} is not understood ({text}): put a value with ~ = , [ or spaces into quotes, twice for the shell: 'key=\"value\"'"
    if NULL_CHOICE in text:
        return "a config group takes the name of one of its files, not null: ~GROUP (such as ~experiment) chooses none"
    if "Could not override 'model/sgs'" in text:
        return "model/sgs picks the layer of a network that samples, and this model has none: take its twin, model=NAME_sgs"
    unknown = re.match(r"Could not override '(.+?)'\. (To append to your config|No match in the defaults list)", text)
    if unknown:
        config = suggestions.composed(config_name, arguments)
        if suggestions.is_argument(unknown[1], config):
            given = next((argument for argument in arguments if argument.partition("=")[0] == unknown[1]), f"{unknown[1]}=...")
            return f"{unknown[1]} is not in the config; an argument of {unknown[1].rpartition('.')[0]} is added with +{given}"
        return unknown_option(unknown[1], config)
    return text


def unknown_option(name: str, config: DictConfig) -> str:
    """Explain in one line that an option does not exist, with similar options or those of the same group."""
    meant = similar_options(name, config)
    if meant:
        return f"{name} is not an option{did_you_mean(meant)}"
    parent = name.rpartition(".")[0]
    beside = [option for option in suggestions.option_names(config) if parent and option.rpartition(".")[0] == parent]
    return f"{name} is not an option; there are {', '.join(beside or map(str, config))}"


def _is_of_submitit(error: Exception) -> bool:
    return type(error).__module__.startswith("submitit.")
