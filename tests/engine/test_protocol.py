"""What the results say was tested."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from composed_configs import composed

from atfr.cli import builders
from atfr.cli.config import build
from atfr.data.clips import ClipSettings
from atfr.engine.distributed.comm import DistInfo

# Each option of a clip that changes predictions, with another value.
CHANGES_PREDICTIONS = {
    "frames": 8, "stride": 3, "fps": 25.0, "fallback_fps": 30.0, "sampling": "segments", "crop_size": 32, "test_short_side": 64, "views": 2,
    "crops": 3, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "decoder": "decord",
}  # fmt: skip


def protocol(config, clip):
    source = SimpleNamespace(name="toy", notes={})
    settings = build(config.trainer, "trainer")
    return builders.protocol(config, SimpleNamespace(execution="packed"), clip, source, settings, DistInfo(0, 1, torch.device("cpu")), checkpoint=Path("best.pt"))


def test_every_option_of_a_clip_is_either_in_the_protocol_or_of_no_concern_to_a_test():
    """A new option belongs into CHANGES_PREDICTIONS above, or into jobs.NOT_OF_A_TEST."""
    assert sorted(field.name for field in fields(ClipSettings)) == sorted([*CHANGES_PREDICTIONS, *builders.NOT_OF_A_TEST])


@pytest.mark.parametrize("name", CHANGES_PREDICTIONS)
def test_tests_of_other_clips_have_other_protocols(name):
    config = composed()
    clip = builders.clip_settings(config)
    before, after = protocol(config, clip), protocol(config, replace(clip, **{name: CHANGES_PREDICTIONS[name]}))
    different = {key for key in before if before[key] != after[key]}
    assert different == ({"sampling", "stride"} if name == "sampling" else {name}) and after[name] == CHANGES_PREDICTIONS[name]


@pytest.mark.parametrize("override", ["trainer.precision=bf16", "trainer.compile=true", "model.sgs.num_bins=3", "model.dropout=0.1"])
def test_tests_that_compute_otherwise_have_other_protocols(override):
    first, second = (protocol(config, builders.clip_settings(config)) for config in (composed(), composed(override)))
    assert first != second
