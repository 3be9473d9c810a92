"""Checkpoints written in the background, while training goes on."""

from __future__ import annotations

import logging
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from atfr.engine.run import checkpoint

log = logging.getLogger(__name__)

AT_ONCE = 2  # states that are copied and not yet written, in the host's memory


class Saver:
    """Writes states in the order in which they are given, in one thread, each from a copy on the host."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: deque[Future] = deque()

    def save(self, state: dict[str, Any], path: Path, *, keep: int = 1) -> None:
        """`checkpoint.save`, soon: what the caller changes in the state from now on is not in it. Raises as `check`."""
        self.check()
        while len(self._pending) >= AT_ONCE:
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(checkpoint.save, copied(state), path, keep=keep))

    def check(self) -> None:
        """Without waiting, raise the error of a state that could not be written."""
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()

    def wait(self) -> None:
        """Until all is written. Raises the error of a state that could not be."""
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """Let what was begun be written, whatever else went wrong; an error that nobody has seen yet is logged."""
        self._thread.shutdown()
        for future in self._pending:
            if future.exception():
                log.error("%s", future.exception())
        self._pending.clear()


def copied(value: Any) -> Any:
    """Plain data with every tensor in it copied to the host's memory."""
    return checkpoint.plain(value, tensor=lambda tensor: tensor.detach().to("cpu", copy=True))
