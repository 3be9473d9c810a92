"""The network that a run of the study (studies/claim/claim.py) has trained, for what is asked of it afterwards."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from atfr.cli.from_checkpoint import trained_model
from atfr.engine.distributed.comm import DistInfo
from atfr.engine.run import checkpoint
from atfr.models.video_net import VideoNet

CPU = DistInfo(0, 1, torch.device("cpu"))


def trained(folder: Path) -> tuple[VideoNet, DictConfig]:
    """The last state of the run in `folder`, for evaluation, and its config."""
    path = folder / "checkpoints" / "last.pt"
    state = checkpoint.load(path)
    config = OmegaConf.create(state["config"])
    return trained_model(config, state, path, CPU).eval(), config
