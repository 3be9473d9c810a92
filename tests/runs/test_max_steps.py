"""A run that `max_steps` ended continues as if it had not ended: rates, weights, validations, the best checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training import SETTINGS, batch, trainer_of

from atfr.engine.optim import cosine
from atfr.engine.run import checkpoint
from atfr.engine.trainer import Trainer
from atfr.engine.validation import Validation
from atfr.models.backbones.x3d import x3d
from atfr.models.sgs.config import SGSConfig

BATCHES = [replace(whole, clips=whole.clips[:4, :, ::2], labels=whole.labels[:4], paths=whole.paths[:4]) for whole in map(batch, range(3))]
WHOLE = replace(SETTINGS, batch_size=4, epochs=4, eval_every=2, statistics_clips=8)
TOP1 = {6: 30.0, 12: 20.0}  # where a validation is due; at any other step it would be the best of all
SGS = SGSConfig.from_preset("atfr", keep_ratio=0.5)


def run(folder: Path, **settings: Any) -> Trainer:
    """Train for 12 steps, or to `max_steps`."""
    torch.manual_seed(0)
    model = x3d(size="tiny", num_classes=3, sgs=SGS)
    trainer = trainer_of(
        model,
        folder,
        learning_rate_factor=cosine(warmup=0.2, start_factor=0.1, end_factor=0.0),
        batches=lambda epoch, start: BATCHES[start:],
        steps_per_epoch=3,
        validate=lambda: Validation({"top1": TOP1.get(trainer.state.step, 90.0)}),
        settings=replace(WHOLE, **settings),
    )
    trainer.run()
    return trainer


def logged(folder: Path, *keys: str) -> list[tuple]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line.get(key) for key in keys) for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


@pytest.mark.slow  # test_kill.py stops a run, too
@pytest.mark.parametrize("ends", [(3,), (2, 4), (6,), (7, 7), (20,)], ids=str)
def test_a_run_in_several_pieces_gives_the_same_results_as_one_without_a_stop(tmp_path, whole, ends, capsys):
    for end in ends:
        run(tmp_path, max_steps=end)
        step = min(end, 12)
        assert logged(tmp_path, "step", "split")[-1] == (step, "val"), "the end of a run is validated"
        # Of a try, the checkpoint with the best validation is there, for its test.
        assert checkpoint.load(tmp_path / "checkpoints/best.pt")["step"] == {12: 6}.get(step, step)
    run(tmp_path)
    keys = ("step", "epoch", "split", "lr", "loss", "grad_norm", "top1", "sgs_width")
    assert logged(tmp_path, *keys) == logged(whole, *keys)
    for name in ("last.pt", "best.pt"):
        first, second = (checkpoint.load(folder / "checkpoints" / name) for folder in (whole, tmp_path))
        for part in ("model", "optimizer", "step", "evaluated", "best_top1"):
            torch.testing.assert_close(first[part], second[part], rtol=0, atol=0, equal_nan=True)
    assert not list((tmp_path / "checkpoints").glob("best-*"))


@pytest.mark.slow
def test_a_kill_at_any_write_after_max_steps_changes_no_result(tmp_path, whole, monkeypatch):
    """Each write of a checkpoint is once the last one before a kill."""
    run(tmp_path, max_steps=7)
    write, left = checkpoint.save, 0

    def killed(state: dict, path: Path, **more: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        write(state, path, **more)

    monkeypatch.setattr(checkpoint, "save", killed)
    for left in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, save_every=2)
    left = 99
    run(tmp_path)
    assert logged(tmp_path, "step", "split", "lr") == logged(whole, "step", "split", "lr")
    for name in ("last.pt", "best.pt"):
        first, second = (checkpoint.load(folder / "checkpoints" / name)["model"] for folder in (whole, tmp_path))
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
