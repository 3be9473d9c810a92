"""Any 3D CNN: a function or class of yours, or of a library, that makes one."""

from __future__ import annotations

import logging
from typing import Callable, Sequence

import torch
from torch import Tensor, nn

from atfr.models.graph.probing import first_line
from atfr.models.sgs.config import SGSConfig
from atfr.models.video_net import VideoNet

log = logging.getLogger(__name__)


def custom(
    *,
    backbone: Callable[..., nn.Module],
    num_classes: int,
    classes_argument: str = "num_classes",
    probe: Sequence[int] = (16, 64, 64),
    sgs: SGSConfig | None = None,
) -> VideoNet:
    """`backbone(num_classes)` with and without SGS; it maps clips [N, 3, T, H, W] to logits [N, classes].

    torch.fx must be able to trace it. SGS goes behind any module's path (`network.named_modules()`
    lists them). Two things that are not of every clip, or not of training, are changed in it: an
    average pool that covers the whole of the probe covers the whole of any clip, and a softmax over
    the classes at its end is left out.

    Args:
        classes_argument: what `backbone` calls the number of classes.
        probe: frames, height and width of a small clip that it can run on.

    Raises:
        ValueError: it does not give one row of `num_classes` logits a clip, or options of `sgs`
            that do not fit (see `VideoNet`).
    """
    try:
        network = backbone(**{classes_argument: num_classes})
        whole, softmax, logits = _watched(network, tuple(probe), num_classes)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"model.backbone cannot be made or run on two clips of {tuple(probe)}: {first_line(error)}") from error
    if logits.shape != (2, num_classes):
        raise ValueError(f"model.backbone gives {tuple(logits.shape)} for two clips of {tuple(probe)} and {num_classes} classes, not (2, {num_classes})")
    for path in whole:
        network.set_submodule(path, nn.AdaptiveAvgPool3d(1))
        log.info("model.backbone: %s, an average over all of a clip of %s, averages over all of any clip", path, tuple(probe))
    if softmax and logits.min() >= 0 and torch.allclose(logits.sum(dim=1), torch.ones(2)):
        network.set_submodule(softmax, nn.Identity())
        log.info("model.backbone: %s, a softmax, is left out: the losses here take logits", softmax)
    return VideoNet(network.train(), stages={}, sgs=sgs, probe=(probe[0], probe[1], probe[2]))


def _watched(network: nn.Module, probe: tuple[int, ...], num_classes: int) -> tuple[list[str], str | None, Tensor]:
    """Paths of the average pools that take in the whole of the probe, and of the last softmax over the classes; two clips' output."""
    covers: dict[str, bool] = {}
    softmax: list[str] = []

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            if isinstance(module, nn.Softmax):
                softmax.extend([path] if output.dim() > 1 and output.shape[1] == num_classes else [])
                return
            sides = inputs[0].shape[2:]
            kernel = (module.kernel_size,) * 3 if isinstance(module.kernel_size, int) else tuple(module.kernel_size)
            covers[path] = covers.get(path, True) and sides[0] > 1 and sides == kernel and output.shape[2:] == (1, 1, 1)

        return hook

    handles = [m.register_forward_hook(watch(path)) for path, m in network.named_modules() if isinstance(m, (nn.AvgPool3d, nn.Softmax))]
    try:
        with torch.no_grad():
            logits = network.eval()(torch.zeros(2, 3, *probe))
    finally:
        for handle in handles:
            handle.remove()
    return [path for path, whole in covers.items() if whole], softmax[-1] if softmax else None, logits
