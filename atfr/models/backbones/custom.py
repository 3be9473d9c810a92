"""Any 3D CNN: a function or class of yours, or of a library, that makes one."""

from __future__ import annotations

from typing import Callable, Sequence

import torch
from torch import nn

from atfr.models.network import VideoNet
from atfr.models.sgs_layer import SGSOptions


def custom(
    *,
    backbone: Callable[..., nn.Module],
    num_classes: int,
    classes_argument: str = "num_classes",
    probe: Sequence[int] = (16, 64, 64),
    sgs: SGSOptions | None = None,
) -> VideoNet:
    """`backbone(num_classes)` with and without SGS; it maps clips [N, 3, T, H, W] to logits [N, classes].

    Its head must pool over whatever it is given, and torch.fx must be able to trace it. SGS goes
    behind any module's path (`network.named_modules()` lists them).

    Args:
        classes_argument: what `backbone` calls the number of classes.
        probe: frames, height and width of a small clip that it can run on.

    Raises:
        ValueError: it does not give one row of `num_classes` logits a clip, or options of `sgs`
            that do not fit (see `VideoNet`).
    """
    try:
        network = backbone(**{classes_argument: num_classes})
        with torch.no_grad():
            shape = tuple(network.eval()(torch.zeros(2, 3, *probe)).shape)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"model.backbone cannot be made or run on two clips of {tuple(probe)}: {str(error).splitlines()[0]}") from error
    if shape != (2, num_classes):
        raise ValueError(f"model.backbone gives {shape} for two clips of {tuple(probe)} and {num_classes} classes, not (2, {num_classes})")
    return VideoNet(network.train(), stages={}, sgs=sgs, probe=tuple(probe))
