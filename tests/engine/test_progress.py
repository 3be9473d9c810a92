"""Progress: bars on a terminal, plain lines in a log file, nothing on other ranks."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress

import pytest

from atfr.utils import progress
from atfr.utils.progress import StepProgress, watched


@pytest.fixture
def clock(monkeypatch) -> Iterator[list[float]]:
    """The time, which moves on by 10 seconds at each look."""
    now = [0.0]

    def look() -> float:
        now[0] += 10
        return now[0]

    monkeypatch.setattr(progress.time, "monotonic", look)
    yield now


@contextmanager
def terminal() -> Iterator[Callable[[], str]]:
    """A terminal for stdout and stderr; gives a function that returns what has been written to it."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # rows, columns
    with os.fdopen(theirs, "w") as file, redirect_stdout(file), redirect_stderr(file):

        def written() -> str:
            file.flush()
            text = b""
            with suppress(BlockingIOError):
                while part := os.read(ours, 65536):
                    text += part
            return text.decode()

        yield written
    os.close(ours)


def test_long_work_in_a_log_file_gives_a_plain_line_every_half_a_minute_and_short_work_none(capsys, clock):
    assert list(watched(range(8), "test", unit="batch")) == list(range(8))
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.splitlines() == [
        "test: batch 3 of 8 after 00:30, about 00:50 left",
        "test: batch 6 of 8 after 01:00, about 00:20 left",
    ]
    list(watched(iter(range(4)), "probe", unit="video", total=104, initial=100))
    assert capsys.readouterr().err == "probe: video 103 of 104 after 00:30, about 00:10 left\n"
    list(watched(iter(range(3)), "statistics", unit="batch"))
    assert capsys.readouterr().err == "statistics: batch 3 after 00:30\n"
    list(watched(range(2), "test", unit="batch"))
    list(watched(range(100), "test", unit="batch", shown=False))
    assert capsys.readouterr() == ("", "")


def test_a_training_in_a_log_file_gives_a_line_at_each_report_with_the_time_left(capsys, clock):
    steps = StepProgress(total=10, shown=True)
    steps.start(4)
    for _ in range(2):
        steps.step()
    steps.report("loss 1.5")
    steps.line("epoch 1/2 step 6: top1 50")
    steps.close()
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out.splitlines() == ["train: step 6 of 10: loss 1.5, about 00:20 left", "epoch 1/2 step 6: top1 50"]
    other = StepProgress(total=10, shown=False)
    other.start(4)
    other.step()
    other.report("loss 1.5")
    other.line("epoch 1/2 step 6: top1 50")
    other.close()
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_there_are_bars_and_a_line_stands_alone():
    with terminal() as written:
        steps = StepProgress(total=10, shown=True)
        steps.start(0)
        steps.step()
        steps.report("loss 1.5")
        assert list(watched(range(3), "validation", unit="batch")) == [0, 1, 2]
        steps.line("epoch 1/2 step 1: top1 50")
        steps.close()
        text = written()
    assert "train:  10%" in text and "loss 1.5" in text and "validation:   0%" in text and "train: step" not in text
    # The bar was wiped out before the line: only blanks stand before it.
    assert re.search(r"\r *\repoch 1/2 step 1: top1 50\r?\n", text), repr(text)


def test_on_a_terminal_other_ranks_write_nothing():
    with terminal() as written:
        other = StepProgress(total=10, shown=False)
        other.start(0)
        other.step()
        other.report("loss 1.5")
        other.line("epoch 1/2 step 1: top1 50")
        list(watched(range(3), "validation", unit="batch", shown=False))
        other.close()
        assert written() == ""
