"""Train a small network for a few steps: settings, batches, a trainer of one rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atfr.engine.distributed.comm import DistInfo
from atfr.engine.settings import TrainerSettings
from atfr.engine.trainer import Trainer
from atfr.engine.validation import Validation
from atfr.models.video_net import VideoNet

SETTINGS = TrainerSettings(
    output_dir=None, batch_size=8, epochs=1, max_steps=None, seed=0, accelerator="cpu", devices=None, precision="fp32", workers=0,
    timeout_s=0, label_smoothing=0.0, clip_norm=None, statistics_clips=0, eval_every=1, save_every=0, log_every=1, resume=True, test=False,
)  # fmt: skip


@dataclass
class Batch:
    clips: Tensor
    labels: Tensor
    paths: tuple[str, ...]
    bad: tuple[str, ...] = ()


def batch(seed: int, *, broken: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    clips = torch.randn(8, 3, 8, 16, 16, generator=generator)
    if broken:
        clips[3, 0, 0, 0, 0] = torch.nan
    return Batch(clips, torch.randint(3, (8,), generator=generator), tuple(f"clip {seed}.{number}" for number in range(8)))


def network() -> VideoNet:
    """A network without batch norm, so that the parts of a batch do not depend on each other."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3))
    return VideoNet(backbone, stages={}, sgs=None)


def trainer_of(model: VideoNet, folder: Path, *, lr: float = 0.1, **options: Any) -> Trainer:
    """Build a trainer of one rank on the CPU, with SGD at a constant rate; `options` replace its arguments or add to them."""
    usual = {
        "optimizer": torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
        "learning_rate_factor": lambda step, total: 1.0,
        "validate": lambda: Validation({"top1": 0.0}),
        "normalise": nn.Identity(),
        "settings": SETTINGS,
        "dist_info": DistInfo(0, 1, torch.device("cpu")),
        "identity": {"config": {}, "choices": {}, "class_names": []},
    }
    return Trainer(model=model, folder=folder, **{**usual, **options})


def train(folder: Path, batches: list[Batch], settings: TrainerSettings = SETTINGS, model: VideoNet | None = None, **options: Any) -> Trainer:
    trainer = trainer_of(model or network(), folder, batches=lambda epoch, start: batches[start:], steps_per_epoch=len(batches), settings=settings, **options)
    trainer.run()
    return trainer
