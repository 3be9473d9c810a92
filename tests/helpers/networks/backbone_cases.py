"""Every backbone, with the library's network that it stands on and the clips that it is tested with."""

from __future__ import annotations

import sys
from typing import Callable, NamedTuple

import torch
from batch_norms import spread
from pytorchvideo.models import hub
from pytorchvideo.models.slowfast import create_slowfast
from pytorchvideo.models.x3d import create_x3d
from torch import nn
from torchvision.models import video

from atfr.models.backbones import csn, r2plus1d, resnet3d, resnets, slowfast, torchvision3d, x3d
from atfr.models.video_net import VideoNet

CLASSES = 6


class Case(NamedTuple):
    """One backbone, the library's network for it, and the published clip (frames, side)."""

    build: Callable[..., VideoNet]
    size: str
    source: Callable[[], nn.Module] | None
    clip: tuple[int, int]
    alpha: int = 1
    frames: int = 4  # of the small clips of these tests
    side: int = 64


def from_hub(name: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: getattr(hub, name)(pretrained=False, model_num_class=CLASSES, **options)


def from_torchvision(build: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    return lambda: build(weights=None, num_classes=CLASSES)


def slowfast_4x16() -> nn.Module:
    """As in PySlowFast's SLOWFAST_4x16_R50; pytorchvideo's hub has no function for it."""
    return create_slowfast(
        model_num_class=CLASSES, slowfast_fusion_conv_kernel_size=(5, 1, 1), slowfast_fusion_conv_stride=(8, 1, 1)
    )


def x3d_source(size: str) -> Callable[[], nn.Module]:
    width, depth = {"tiny": (1.0, 1.0), "L": (2.0, 5.0), "XL": (2.9, 5.0)}.get(size, (2.0, 2.2))
    return lambda: create_x3d(model_num_class=CLASSES, width_factor=width, depth_factor=depth, head_activation=None)


X3D_CLIPS = {"tiny": (16, 48), "XS": (4, 160), "S": (13, 160), "M": (16, 224), "L": (16, 312), "XL": (16, 312)}
CASES = {
    **{f"x3d {size}": Case(x3d.x3d, size, x3d_source(size), clip) for size, clip in X3D_CLIPS.items()},
    "slow R50": Case(resnets.slow, "R50", from_hub("slow_r50"), (8, 224)),
    "c2d R50": Case(resnets.c2d, "R50", from_hub("c2d_r50"), (8, 224)),
    "i3d R50": Case(resnets.i3d, "R50", from_hub("i3d_r50"), (8, 224)),
    "r2plus1d R50": Case(r2plus1d.r2plus1d, "R50", from_hub("r2plus1d_r50", head_activation=None), (16, 224)),
    "r2plus1d 18": Case(r2plus1d.r2plus1d, "18", from_torchvision(video.r2plus1d_18), (16, 112), side=48),
    "csn R101": Case(csn.csn, "R101", from_hub("csn_r101"), (32, 224)),
    "r3d 18": Case(torchvision3d.r3d, "18", from_torchvision(video.r3d_18), (16, 112), side=48),
    "mc3 18": Case(torchvision3d.mc3, "18", from_torchvision(video.mc3_18), (16, 112), side=48),
    "s3d base": Case(torchvision3d.s3d, "base", from_torchvision(video.s3d), (128, 224), frames=24),
    "slowfast 4x16-R50": Case(slowfast.slowfast, "4x16-R50", slowfast_4x16, (32, 224), alpha=8, frames=16),
    "slowfast 8x8-R50": Case(slowfast.slowfast, "8x8-R50", from_hub("slowfast_r50"), (32, 224), alpha=4, frames=8),
    "slowfast 8x8-R101": Case(slowfast.slowfast, "8x8-R101", from_hub("slowfast_r101"), (32, 224), alpha=4, frames=8),
    "resnet3d tiny": Case(resnet3d.resnet3d, "tiny", None, (16, 48)),
    "resnet3d 18": Case(resnet3d.resnet3d, "18", None, (32, 224)),
    "resnet3d 50": Case(resnet3d.resnet3d, "50", None, (32, 224)),
}
NETWORKS = ["x3d tiny", "slow R50", "c2d R50", "i3d R50", "r2plus1d 18", "csn R101", "r3d 18", "mc3 18", "s3d base", "resnet3d 18", "slowfast 8x8-R50"]  # one of each kind


def lively(network: nn.Module, *inputs: object) -> nn.Module:
    """Batch norms away from the identity and logits of spread one, in evaluation mode."""
    spread(network)
    last = [module for module in network.modules() if isinstance(module, (nn.Linear, nn.Conv3d)) and module.bias is not None][-1]
    nn.init.normal_(last.weight)
    with torch.no_grad():
        last.weight /= network(*inputs).std()
    return network


def stages_of(case: Case) -> dict:
    if case.build in (resnets.c2d, resnets.i3d):
        return resnets.POOLED_STAGES
    if case.build is torchvision3d.s3d:
        return torchvision3d.S3D_STAGES
    if case.build is r2plus1d.r2plus1d:
        return r2plus1d.SIZES[case.size]
    return sys.modules[case.build.__module__].STAGES
