"""Warn once about a condition that many clips meet."""

from __future__ import annotations

import logging

_given: set[str] = set()


def warn_once(log: logging.Logger, condition: str, message: str) -> None:
    """Log a warning for a condition once per process; each worker of a loader is a process."""
    if condition not in _given:
        _given.add(condition)
        log.warning("%s", message)
