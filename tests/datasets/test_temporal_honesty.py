"""The built-in dataset can only be solved by the order of events: shown on a network trained on it."""

from __future__ import annotations

import json

import pytest
import torch
from omegaconf import OmegaConf
from run_tools import run_tool

from atfr.cli.builders import clip_settings
from atfr.cli.config import build
from atfr.data.clips import TestClips, collate
from atfr.data.transforms import Normalizer
from atfr.engine.run import checkpoint


@pytest.mark.slow
def test_a_trained_networks_accuracy_falls_by_more_than_half_when_frames_are_shuffled(tmp_path):
    outcome = run_tool(
        "train",
        f"dataset.root={tmp_path / 'data'}",
        "dataset.train=600",
        "dataset.test=96",
        "dataset.dwell=even",  # nothing is missed with few frames
        "dataset.clip.frames=8",
        "dataset.clip.stride=4",
        "dataset.clip.views=1",
        "dataset.clip.crop_size=32",
        "dataset.clip.train_short_side=[32,38]",
        "dataset.clip.test_short_side=32",
        f"dataset.clip.cache={tmp_path / 'decoded'}",
        "model=r2plus1d",
        "trainer.workers=0",
        "trainer.epochs=8",
        "trainer.eval_every=8",
        f"trainer.output_dir={tmp_path / 'run'}",
    )
    assert outcome.code == 0, outcome.err
    ordered = json.loads((tmp_path / "run/results.json").read_text())["top1"]
    assert ordered > 60, ordered  # chance is 12.5

    state = checkpoint.load(tmp_path / "run/checkpoints/best.pt")
    config = OmegaConf.create(state["config"])
    clip = clip_settings(config)
    model = build(config.model, "model", num_classes=len(state["class_names"])).eval()
    model.load_state_dict(state["model"])
    data = TestClips(build(config.dataset, "dataset").test, clip, views=1, crops=1)
    batch = collate([data[i] for i in range(len(data))])
    clips = Normalizer(clip.mean, clip.std)(batch.clips)

    def top1(clips: torch.Tensor) -> float:
        with torch.no_grad():
            logits = torch.cat([model(part) for part in clips.split(16)])
        return 100 * (logits.argmax(dim=1) == batch.labels).float().mean().item()

    assert top1(clips) == pytest.approx(ordered)
    shuffled = torch.stack([c[:, torch.randperm(c.shape[1])] for c in clips])
    assert top1(shuffled) < ordered / 2
    assert top1(clips[:, :, 4:5].expand_as(clips)) < ordered / 2  # one frame, held
