"""Settings of small clips."""

from __future__ import annotations

from typing import Any

from atfr.data.clips import ClipSettings

SETTINGS = {
    "frames": 4,
    "stride": 2,
    "crop_size": 24,
    "train_short_side": [24, 32],
    "test_short_side": 32,
    "mean": [0.4, 0.5, 0.6],
    "std": [0.1, 0.2, 0.3],
}


def settings(**changes: Any) -> ClipSettings:
    return ClipSettings(**{**SETTINGS, **changes})
