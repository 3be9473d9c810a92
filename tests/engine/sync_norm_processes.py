"""Run by test_sync_norm.py as two ranks: batch norm over several ranks compared with one that has all clips. Exits non-zero if they differ."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Iterable

import torch
import training
from torch import Tensor, nn

from atfr.engine.calibration import calibrate_layers, refresh_statistics
from atfr.engine.distributed import comm
from atfr.engine.distributed.comm import DistInfo
from atfr.engine.distributed.sync_batchnorm import sync_batchnorm
from atfr.engine.optim import sgd
from atfr.models.backbones.x3d import x3d
from atfr.models.sgs.config import SGSConfig
from atfr.models.video_net import VideoNet

ATFR = SGSConfig.from_preset("atfr", keep_ratio=0.5)
PATH = SGSConfig.from_preset("atfr", similarity="path", embedding="frozen", embed_from="features", noise_floor=True, keep_ratio=0.5)  # its embedding has a batch norm
SETTINGS = replace(training.SETTINGS, batch_size=6, label_smoothing=0.1, clip_norm=5.0, statistics_clips=12, sync_batch_norm=True)


def clips(seed: int) -> Tensor:
    """Six clips, the later ones with more change, so that one rank keeps more features than another."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, 8, 32, 32, generator=generator).cumsum(dim=2) / 4 * torch.linspace(0.2, 2, 6)[:, None, None, None, None]


def network(options: SGSConfig = ATFR) -> VideoNet:
    torch.manual_seed(0)
    return x3d(size="tiny", num_classes=3, dropout=0.0, sgs=options)


def statistics_of(options: SGSConfig, rank: int, world: int, *, untrained: bool) -> dict[str, Tensor]:
    """Return the buffers after the statistics of 24 clips in four global batches."""
    model = network(options)
    batches = [clips(seed)[rank::world] for seed in range(4)]
    calibrate_layers(model, lambda: batches, untrained=untrained)
    refresh_statistics(model, lambda: batches)
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def losses_of(folder: Path, dist_info: DistInfo, steps: int) -> list[dict[str, float]]:
    """Return what these steps log."""
    model = network()

    def batches(epoch: int, start: int) -> Iterable[training.Batch]:
        for step in range(start, steps):
            x, labels = clips(step)[dist_info.rank :: dist_info.world], torch.arange(6)[dist_info.rank :: dist_info.world] % 3
            yield training.Batch(x, labels, ("a",) * len(x))

    settings = replace(SETTINGS, checkpoint_activations=dist_info.world > 1)  # which must change nothing
    optimizer = sgd(model, lr=0.01, momentum=0.9, weight_decay=1e-4, nesterov=True)
    training.trainer_of(model, folder, optimizer=optimizer, batches=batches, steps_per_epoch=steps, settings=settings, dist_info=dist_info).run()
    assert "forward" not in model.dense_network.blocks[0].norm.__dict__, "the forward methods were not restored"
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if '"train"' in line] if dist_info.is_main else []


def check_layer(rank: int) -> None:
    """Outputs, gradients and running statistics of one batch norm, with unequal numbers of clips on the ranks."""
    for norm, shape in ((nn.BatchNorm3d(5), (9, 5, 4, 3, 3)), (nn.BatchNorm1d(5, momentum=None), (9, 5, 7)), (nn.BatchNorm3d(5, affine=False), (9, 5, 2, 2, 2))):
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
            torch.manual_seed(0)
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.normal_(norm.bias)
            whole = (torch.randn(shape) * 3 + 10).to(dtype).requires_grad_()
            if len(shape) == 5:
                whole = whole.detach().contiguous(memory_format=torch.channels_last_3d).requires_grad_()
            factor = torch.randn(shape)
            own = (slice(0, 2), slice(2, 9))[rank]
            alone, together = copy.deepcopy(norm), copy.deepcopy(norm)
            part = whole.detach()[own].clone().requires_grad_()
            for _ in range(2):
                expected = alone(whole)
                with sync_batchnorm(together):
                    found = together(part)
            (expected.float() * factor).sum().backward()
            (found.float() * factor[own]).sum().backward()

            def same(one: Tensor, other: Tensor) -> None:
                torch.testing.assert_close(one.float(), other.float(), rtol=tolerance, atol=tolerance)

            same(found, expected[own])
            same(part.grad, whole.grad[own])
            for (name, buffer), other in zip(together.named_buffers(), alone.buffers()):
                same(buffer, other)
            for mine, other in zip(together.parameters(), alone.parameters()):
                same(comm.summed(mine.grad.clone()), other.grad)
            same(together.eval()(part), alone.eval()(whole)[own])


def main(folder: Path, steps: int, thorough: bool) -> None:
    cases = [(options, untrained) for options in (ATFR, PATH) for untrained in (True, False) if thorough or untrained == (options is ATFR)]
    # Before there is a group: alone.
    expected = [statistics_of(options, 0, 1, untrained=untrained) for options, untrained in cases]
    dist_info = comm.start(accelerator="cpu", devices=None)
    check_layer(dist_info.rank)
    for (options, untrained), buffers in zip(cases, expected):
        for name, value in statistics_of(options, dist_info.rank, dist_info.world, untrained=untrained).items():
            torch.testing.assert_close(value, buffers[name], rtol=1e-4, atol=1e-5, msg=lambda text: f"{options.similarity}: {name}: {text}")
    lines = losses_of(folder / "together", dist_info, steps)
    if dist_info.is_main:
        comm.stop()
        compare(losses_of(folder / "alone", DistInfo(0, 1, torch.device("cpu")), steps), lines, steps)


def compare(alone: list[dict[str, float]], together: list[dict[str, float]], steps: int) -> None:
    assert len(alone) == len(together) == steps and len({line["loss"] for line in alone}) == steps
    for one, other in zip(alone, together):
        for key in ("loss", "grad_norm", "bins", "sgs_width"):
            torch.testing.assert_close(other[key], one[key], rtol=1e-4, atol=0, msg=lambda text: f"step {one['step']}: {key}: {text}")

