"""The checkpoints of a run: saved in the background, and found again by a run that resumes."""

from __future__ import annotations

import logging
import os
import shutil
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from atfr.engine.run import checkpoint

log = logging.getLogger(__name__)

MOST_PENDING = 2  # states in the host's memory that are not written yet


class Checkpointer:
    """Saves `last.pt` and `best.pt` of a run folder while training continues, and loads the one to resume from.

    `save` copies a state to the host's memory. A thread writes these copies in the order of the calls.
    """

    def __init__(self, folder: Path) -> None:
        self.last, self.best = folder / "checkpoints" / "last.pt", folder / "checkpoints" / "best.pt"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: deque[Future] = deque()

    def save(self, state: dict[str, Any], path: Path, *, keep: int = 1) -> None:
        """Write a copy of `state` in the background, as `checkpoint.save` does. Waits while too many states are pending.

        Raises:
            OSError: an earlier state could not be written.
        """
        self.check()
        while len(self._pending) >= MOST_PENDING:
            self._pending.popleft().result()
        copy = checkpoint.plain(state, tensor=lambda tensor: tensor.detach().to("cpu", copy=True))
        self._pending.append(self._thread.submit(checkpoint.save, copy, path, keep=keep))

    def check(self) -> None:
        """Raise the error of a state that could not be written, without waiting for the others."""
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()

    def wait(self) -> None:
        """Wait until all states are written. Raises the error of one that could not be."""
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """Finish writing the pending states. An error that was not raised yet is logged."""
        self._thread.shutdown()
        for future in self._pending:
            if future.exception():
                log.error("%s", future.exception())
        self._pending.clear()

    def load_last(self) -> tuple[dict[str, Any], Path]:
        """Load `last.pt`, or with a warning the newest earlier checkpoint if it is damaged. Returns the state and its file.

        Raises:
            ValueError: `last.pt` is damaged, and so are all earlier ones.
        """
        try:
            return checkpoint.load(self.last), self.last
        except ValueError as error:
            number = 1
            while (older := checkpoint.earlier(self.last, number)).exists():
                try:
                    state = checkpoint.load(older)
                except ValueError:
                    number += 1
                    continue
                log.warning("%s; resuming from %s instead", error, older)
                return state, older
            raise ValueError(f"{error}; {self.last.parent} has no earlier one that can be read: delete {self.last} to start anew, or set another trainer.output_dir") from error

    def continue_from(self, path: Path) -> None:
        """Rename the files for a run that resumes from `path`, which `load_last` returned."""
        if path != self.last:
            shutil.copyfile(self.last, self.last.with_name(self.last.name + ".damaged"))  # a copy: without a last.pt a run would start anew
            os.replace(path, self.last)
        if (regular := checkpoint.earlier(self.best, 1)).exists():
            os.replace(regular, self.best)  # the validation at the end of a shorter run does not count in this one
