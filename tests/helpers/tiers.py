"""Which cases of a parametrised test run in the main tier."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow_but(values: Iterable[Any], is_quick: Callable[[Any], bool]) -> list[Any]:
    """Return the values of a parametrised test, those that are not quick marked as slow."""
    return [value if is_quick(value) else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow) for value in values]
