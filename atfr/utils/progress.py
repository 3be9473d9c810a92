"""Show the progress of long work: as a bar on a terminal, as plain lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

EVERY_S = 30.0  # between two lines of `watched` in a log file


def on_terminal() -> bool:
    """Return whether stderr is a terminal, where bars are drawn."""
    return sys.stderr is not None and sys.stderr.isatty()


def watched(
    items: Iterable[T], title: str, *, unit: str, total: int | None = None, initial: int = 0, shown: bool = True, leave: bool = False
) -> Iterable[T]:
    """Iterate over `items` and show the progress on stderr.

    In a log file, this prints a line every 30 seconds, so short work prints nothing.

    Args:
        total: number of items, including the `initial` ones that were done before. None: `len(items)`, if it has one.
        shown: False on all ranks but the first.
        leave: keep the bar on the terminal after the last item.
    """
    if not shown:
        return items
    if total is None and isinstance(items, Sized):
        total = len(items)
    if on_terminal():
        return tqdm(items, desc=title, unit=unit, total=total, initial=initial, leave=leave, smoothing=0.05)
    return _with_lines(items, title, unit=unit, total=total, initial=initial)


def _with_lines(items: Iterable[T], title: str, *, unit: str, total: int | None, initial: int) -> Iterator[T]:
    began = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= EVERY_S:
            last = now
            of = f" of {total}" if total is not None else ""
            left = f", {_left(now - began, done, (total or 0) - initial - done)}" if total is not None else ""
            print(f"{title}: {unit} {initial + done}{of} after {tqdm.format_interval(now - began)}{left}", file=sys.stderr, flush=True)


def _left(seconds: float, done: int, left: int) -> str:
    return f"about {tqdm.format_interval(seconds / done * max(left, 0))} left"


class StepProgress:
    """Show the progress of a training: a bar on a terminal, a line for each `report` in a log file.

    Lines go to stdout, the bar to stderr. Nothing is printed if `shown` is False.
    """

    def __init__(self, *, total: int, shown: bool) -> None:
        self.total, self.shown = total, shown
        self.done = self._first = 0
        self._bar = tqdm(disable=True)

    def start(self, step: int) -> None:
        """Start the clock at `step`, and show the bar."""
        self.done = self._first = step
        self._began = time.monotonic()
        self._bar = tqdm(initial=step, total=self.total, unit="step", desc="train", disable=not (self.shown and on_terminal()))

    def step(self) -> None:
        self.done += 1
        self._bar.update()

    def report(self, text: str) -> None:
        """Show metrics of the last steps."""
        if not self._bar.disable:
            self._bar.set_postfix_str(text)
        elif self.done > self._first:
            left = _left(time.monotonic() - self._began, self.done - self._first, self.total - self.done)
            self.line(f"train: step {self.done} of {self.total}: {text}, {left}")

    def line(self, text: str) -> None:
        """Print a separate line without breaking the bar."""
        if not self.shown:
            return
        if self._bar.disable:
            print(text, flush=True)
        else:
            self._bar.write(text)

    def close(self) -> None:
        self._bar.close()
