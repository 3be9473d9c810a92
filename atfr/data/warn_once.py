"""Warnings about a condition that holds for many clips."""

from __future__ import annotations

import logging

_given: set[str] = set()


def warn_once(log: logging.Logger, condition: str, message: str) -> None:
    """Log a warning for a condition, once in a process: a loader's workers are processes of their own."""
    if condition not in _given:
        _given.add(condition)
        log.warning("%s", message)
