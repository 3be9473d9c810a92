"""Work that a program can do without: an error in it must not cost the rest."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)


@contextmanager
def or_warn(loss: str) -> Iterator[None]:
    """Log an error in this block as a warning that begins with `loss`, what is missing now, and continue behind the block."""
    try:
        yield
    except Exception as error:
        log.warning("%s: %s: %s", loss, type(error).__name__, error, exc_info=log.isEnabledFor(logging.DEBUG))
