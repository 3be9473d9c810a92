"""Build a network with SGS: by name, or around a network of the user's own."""

from __future__ import annotations

import difflib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping

from torch import nn

from atfr.models.backbones import csn, inception_i3d, r2plus1d, resnet3d, resnets, slowfast, torchvision3d, x3d
from atfr.models.pretrained.load import load_pretrained
from atfr.models.pretrained.published import find_published
from atfr.models.sgs.config import SGSConfig
from atfr.models.video_net import VideoNet

log = logging.getLogger(__name__)

# The function of each file of configs/model, its sizes, and the size of the bare name.
BACKBONES: dict[str, tuple[Callable[..., VideoNet], Iterable[str], str]] = {
    "x3d": (x3d.x3d, x3d.SIZES, "S"),
    "resnet3d": (resnet3d.resnet3d, resnet3d.SIZES, "50"),
    "r2plus1d": (r2plus1d.r2plus1d, r2plus1d.SIZES, "R50"),
    "slow": (resnets.slow, resnets.SIZES, "R50"),
    "c2d": (resnets.c2d, resnets.SIZES, "R50"),
    "i3d": (resnets.i3d, resnets.SIZES, "R50"),
    "i3d_inception": (inception_i3d.inception_i3d, inception_i3d.SIZES, "base"),
    "slowfast": (slowfast.slowfast, slowfast.SIZES, "8x8-R50"),
    "csn": (csn.csn, csn.SIZES, "R101"),
    "r3d": (torchvision3d.r3d, torchvision3d.R3D_SIZES, "18"),
    "mc3": (torchvision3d.mc3, torchvision3d.MC3_SIZES, "18"),
    "s3d": (torchvision3d.s3d, torchvision3d.S3D_SIZES, "base"),
}


def create_model(
    name: str, num_classes: int | None = None, *, sgs: str | SGSConfig | None = None, weights: str | Path | None = None, **options: Any
) -> VideoNet:
    """Build the network `name` for clips [N, 3, T, H, W].

    Args:
        name: a backbone or a backbone and its size, such as "x3d", "x3d_s" or "slowfast_4x16_r50" (see `model_names`).
        num_classes: None: as many as the published `weights` have.
        sgs: where and how features are sampled: a preset's name or an SGSConfig; None for the dense network.
        weights: published weights such as "torchvision:r3d_18" or "pytorchvideo:x3d_s", downloaded once, or a file (see
            `load_pretrained`); a classifier of other classes stays new. None: random weights.
        options: further arguments of the backbone, such as `dropout`.

    Raises:
        ValueError: there is no such network, options of `sgs` do not fit it (see `VideoNet`), or the weights are of another
            network or cannot be downloaded or read.
        FileNotFoundError: there is no such file of weights.
    """
    found = model_names().get(name.lower().replace("-", "_"))
    if found is None:
        near = difflib.get_close_matches(name.lower(), model_names(), n=5) or list(BACKBONES)
        raise ValueError(f"there is no model {name!r}; did you mean {', '.join(near)}?")
    backbone, size = found
    if "size" in options:
        raise ValueError(f"the size is a part of the name: create_model({full_name(backbone, str(options['size']))!r}, ...)")
    published = None if weights is None else find_published(str(weights))
    if published is not None:
        published.require_fit(full_name(backbone, size))
        num_classes = published.num_classes if num_classes is None else num_classes
    if num_classes is None:
        raise ValueError("num_classes is not set, and no published weights of a video network give it")
    model = BACKBONES[backbone][0](size=size, num_classes=num_classes, sgs=sgs_config(sgs), **options)
    if weights is not None:
        file = Path(weights) if published is None else published.download()
        log.info(load_pretrained(model, file, key="weights").as_table())
    return model


def model_names() -> dict[str, tuple[str, str]]:
    """Return {name that `create_model` takes: (backbone, size)}."""
    names = {}
    for backbone, (_, sizes, default) in BACKBONES.items():
        names[backbone] = backbone, default
        names.update({full_name(backbone, size): (backbone, size) for size in sizes})
    return names


def full_name(backbone: str, size: str) -> str:
    """Return the name of a backbone with its size, as `create_model` takes it."""
    return f"{backbone}_{size.lower().replace('-', '_')}"


def add_sgs(
    network: nn.Module,
    *,
    after: str | list[str] | None = None,
    sgs: str | SGSConfig = "atfr",
    stages: Mapping[str, str] | None = None,
    probe: tuple[int, int, int] = (16, 64, 64),
) -> VideoNet:
    """Put SGS into a 3D CNN of yours. Its modules stay as they are, and so do its parameters and their names.

    Args:
        network: maps clips [N, 3, T, H, W] to logits [N, classes]. torch.fx must be able to trace it, and its head must
            pool over any number of features in time.
        after: the path of the module whose output is sampled (`network.named_modules()` lists them), several, or "input"
            for the clips themselves; None: as `sgs` has it.
        sgs: a preset's name or an SGSConfig.
        stages: {short name: path of a module}, for names of your own in `after`.
        probe: frames, height and width of a small clip that the network can run on.

    Returns:
        The network with SGS. Call `atfr.calibrate` before its first use, unless the SGSConfig sets `width` or `num_bins`.

    Raises:
        ValueError: see `VideoNet`.
    """
    config = sgs_config(sgs)
    if isinstance(network, VideoNet):
        raise ValueError("this is a VideoNet already: add_sgs takes a plain network, such as its dense_network")
    if config is None:
        raise ValueError("add_sgs needs a preset or an SGSConfig, not None or 'off': use the network as it is")
    if after is not None:
        config = replace(config, after=after)
    return VideoNet(network, stages=stages or {}, sgs=config, probe=probe)


def sgs_config(sgs: str | SGSConfig | None) -> SGSConfig | None:
    """Return the SGSConfig of a preset's name; None for "off"."""
    if isinstance(sgs, str):
        return None if sgs == "off" else SGSConfig.from_preset(sgs)
    return sgs
