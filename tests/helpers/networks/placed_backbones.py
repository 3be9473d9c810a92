"""Backbones with SGS at any of their locations, and whether a clip is the same on them alone and in batches."""

from __future__ import annotations

import functools
import random
from dataclasses import replace
from typing import NamedTuple

import torch
from backbone_cases import CASES, CLASSES, lively, stages_of
from outcomes import run
from torch import Tensor, nn
from uneven_clips import TOLERANCE, uneven_clips

from atfr.models.backbones.slowfast import Fusion
from atfr.models.sgs.config import SGSConfig
from atfr.models.video_net import VideoNet

ATFR = SGSConfig.from_preset("atfr", keep_ratio=0.5)
REFERENCE = SGSConfig.from_preset("reference")
EVERYWHERE = ("stem", "res2", "res3", "res4", ("res2", "res4"))
SOME = ("res2", "res3", ("stem", "res4"))
PATHWAYS = ("stem", "res2", ("res2", "res4"), "fast.res2", ("slow.res2", "fast.res3"), ("fast.res2", "slow.res3"))


class Net(NamedTuple):
    """How a backbone is tested: frames of a clip, and where SGS goes."""

    frames: int
    block: str  # path of a block inside a stage
    locations: tuple = EVERYWHERE
    side: int = 32

    @property
    def probe(self) -> tuple[int, int, int]:
        return self.frames, self.side, self.side


NETS = {
    "x3d tiny": Net(8, "blocks.2.res_blocks.0"),
    "x3d S": Net(8, "blocks.2.res_blocks.0", ("res2", "res3")),
    "slow R50": Net(8, "blocks.2.res_blocks.0", SOME),
    "c2d R50": Net(8, "blocks.3.res_blocks.0", SOME, side=16),
    "i3d R50": Net(8, "blocks.3.res_blocks.0"),
    "r2plus1d R50": Net(8, "blocks.3.res_blocks.0", SOME, side=16),
    "r2plus1d 18": Net(8, "layer2.0", side=16),
    "csn R101": Net(8, "blocks.2.res_blocks.0", ("res2", ("stem", "res3")), side=16),
    "r3d 18": Net(8, "layer2.0", SOME, side=16),
    "mc3 18": Net(8, "layer2.0", SOME, side=16),
    "s3d base": Net(24, "features.5"),
    "resnet3d tiny": Net(8, "blocks.2.res_blocks.0", SOME),
    "resnet3d 18": Net(8, "blocks.2.res_blocks.0", SOME),
    "resnet3d 50": Net(8, "blocks.2.res_blocks.0", ("res2", ("stem", "res4"))),
    "slowfast 4x16-R50": Net(32, "blocks.2.multipathway_blocks.1.res_blocks.0", ("slow.res2",), side=16),
    "slowfast 8x8-R50": Net(16, "blocks.2.multipathway_blocks.1.res_blocks.0", PATHWAYS, side=16),
}  # fmt: skip


def in_words(value: object) -> str:
    """Name a test's parameters in its id."""
    return value if isinstance(value, str) else " ".join(map(in_words, value))


def paths_of(name: str, location: str | tuple[str, ...]) -> dict[str, str]:
    """Return {layer: path of the module that it samples}, as `model.sgs.after` has it."""
    stages, paths = stages_of(CASES[name]), {}
    for part in (location,) if isinstance(location, str) else location:
        target = stages.get(part, part)
        paths |= {part: target} if isinstance(target, str) else {t: stages[t] for t in target}
    return paths


def clips_for(name: str, count: int, least: int = 1) -> Tensor:
    return uneven_clips(count, NETS[name].frames, NETS[name].side, least)


@functools.lru_cache(maxsize=2)
def backbone(name: str) -> nn.Module:
    """Batch norms away from the identity, so that padding would leak, and logits of spread one."""
    case = CASES[name]
    state = random.getstate()
    with torch.random.fork_rng():  # a test draws the same whether its network is there already or not
        torch.manual_seed(0)
        random.seed(0)
        network = lively(case.build(size=case.size, num_classes=CLASSES).dense_network, clips_for(name, 4))
    random.setstate(state)
    return network


@functools.lru_cache(maxsize=4)
def placed(name: str, location: str | tuple[str, ...], sgs: SGSConfig = ATFR) -> VideoNet:
    """The backbone, shared with other locations, with SGS somewhere."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = VideoNet(backbone(name), stages=stages_of(CASES[name]), sgs=replace(sgs, after=location), probe=NETS[name].probe).eval()
    assert net.execution == "packed"
    return net


def built(name: str, location: str | tuple[str, ...], rule: str = "aligned", sgs: SGSConfig = ATFR) -> VideoNet:
    net = placed(name, location, sgs)
    for module in net.modules():
        if isinstance(module, Fusion):
            module.rule = rule
    return net


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def calibrated(net: VideoNet, clips: Tensor) -> None:
    """Give every layer a width at which the clips keep different numbers of features."""
    for layer in net.sgs.values():
        layer.width.fill_(1e-3)
    for layer, sampled in zip(net.sgs.values(), run(net, clips).layers):
        layer.calibrate(sampled.proposal.z, torch.tensor(sampled.given))
    # With few clips the width found is a distance between two frames, and rounding would decide.
    for factor in (1.03, 0.9, 0.8, 0.7, 0.6, 0.5):
        for layer in net.sgs.values():
            layer.width.mul_(factor)
        if all(different(s.segments.lengths, s.segments.frames) for s in run(net, clips).layers):
            return


def different(lengths: tuple[int, ...], frames: int) -> bool:
    """Whether clips keep different numbers of features, where there are enough of them to choose from."""
    return len(set(lengths)) > 1 or frames <= 6


def check_alone_and_in_batches(net: VideoNet, clips: Tensor, batches: int = 1, most: int = 2) -> None:
    with torch.no_grad():
        alone = [run(net, clip[None]) for clip in clips]
        for number, frames in enumerate(alone[0].frames):
            assert different(tuple(a.bins[0][number] for a in alone), frames)
        everything = list(range(len(clips)))
        for chosen in (everything, *(random.sample(everything, random.randint(2, most)) for _ in range(batches))):
            batch = run(net, clips[chosen])
            assert batch.bins == [alone[i].bins[0] for i in chosen]
            close(batch.logits, torch.cat([alone[i].logits for i in chosen]), TOLERANCE)
