"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from devices import hide_gpus, number_of_gpus
from run_tools import signal_handlers_kept
from video_files import write_video

LONGEST = (
    *("test_slurm", "test_kill", "test_packed_backbones", "test_tested_checkpoints", "test_several_processes", "test_one_step", "test_configs"),
    *("test_command_line", "test_run_outputs", "test_user_mistakes", "test_backbones", "test_readme", "test_accounting", "test_api", "test_predict"),
    "test_examples",
)

hide_gpus()
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5  # the seconds that a garbage collection waits for a worker of a loader that is gone; 5 in torch
yaml.SafeLoader = yaml.CSafeLoader  # OmegaConf reads configs with it; the parser in C is faster
torch.set_num_threads(1)  # the networks are small, and the tests run in parallel


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: one that starts last would be waited for alone. Each file is run by one process."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_collection_finish() -> None:
    """Keep what the imports left out of every garbage collection, half a second of which passes over it."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that need more GPUs than there are."""
    marker = item.get_closest_marker("gpu")
    if marker is not None:
        needed = marker.args[0] if marker.args else 1
        if (found := number_of_gpus(needed)) < needed:
            pytest.skip(f"needs {needed} GPU(s), and torch sees {found}")


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_signal_handlers():
    """Also of a test that runs a program by other ways than `run_tool`."""
    with signal_handlers_kept():
        yield


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real clips and annotations, where there is one."""
    folder = os.environ.get("ATFR_TEST_DATA")
    if not folder:
        pytest.skip("ATFR_TEST_DATA does not name a folder of real videos")
    return Path(folder)


@pytest.fixture(scope="session")
def small_videos(tmp_path_factory) -> Path:
    """Twelve tiny videos of two classes: a bright square that moves to the right, or downwards.

    Lists train.csv (8) and test.csv (4), with class names.
    """
    root = tmp_path_factory.mktemp("small videos")
    lists: dict[str, list[str]] = {"train": [], "test": []}
    rng = np.random.default_rng(0)
    for i in range(12):
        label = ("right", "down")[i % 2]
        frames = rng.integers(0, 40, (24, 48, 64, 3), dtype=np.uint8)
        for t, frame in enumerate(frames):
            x, y = (2 * t, 16) if label == "right" else (24, t)
            frame[y : y + 12, x : x + 12] = 230
        name = f"{label} {i}.mp4"
        write_video(root / name, frames, codec="libx264")
        lists["train" if i < 8 else "test"].append(f"{name},{label}")
    for split, lines in lists.items():
        (root / f"{split}.csv").write_text("path,label\n" + "\n".join(lines) + "\n")
    return root
