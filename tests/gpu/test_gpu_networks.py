"""Networks and the training step on a GPU: batch invariance, determinism, precision, and waits of the host."""

from __future__ import annotations

import random
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from backbone_cases import CASES, NETWORKS, lively, stages_of
from depthwise_checks import CASES as CONVOLUTIONS
from depthwise_checks import F32, Case, check_against_float64
from devices import on_gpu
from outcomes import run
from placed_backbones import NETS, backbone, built, calibrated, check_alone_and_in_batches, clips_for
from small_clips import settings
from torch import nn
from training import SETTINGS, Batch, trainer_of

import atfr
from atfr.data.clips import TestClips
from atfr.data.loader import test_loader
from atfr.data.types import Video
from atfr.engine.determinism import choose_algorithms
from atfr.engine.distributed.comm import DistInfo
from atfr.engine.prefetch import prefetched
from atfr.models.backbones.x3d import x3d
from atfr.models.packed.kernels import depthwise
from atfr.models.sgs.config import SGSConfig
from atfr.models.sgs.sampling import HostCopy
from atfr.models.video_net import VideoNet

pytestmark = pytest.mark.gpu
GPU = "cuda:0"
ATFR = SGSConfig.from_preset("atfr", after="res2", keep_ratio=0.5)
INVARIANT = ["x3d tiny", "slow R50", "c2d R50", "i3d R50", "r2plus1d 18", "csn R101", "r3d 18", "s3d base", "resnet3d 18", "slowfast 8x8-R50"]


@pytest.mark.parametrize("name", INVARIANT)
def test_a_clip_in_float32_is_the_same_alone_and_in_any_batch_to_1e_4(name, tmp_path):
    on_gpu(check_float32, name, output=tmp_path / "said.txt")


def check_float32(name: str) -> None:
    seeded()
    choose_algorithms(deterministic=False, tf32=False)
    net, clips = built(name, "res2"), clips_for(name, 5)
    with torch.no_grad():
        calibrated(net, clips)
    check_alone_and_in_batches(net.to(GPU), clips.to(GPU))


@pytest.mark.parametrize("name", INVARIANT)
def test_a_clip_in_bfloat16_is_the_same_alone_and_in_a_batch_to_a_tenth_of_the_logits_spread(name, tmp_path):
    on_gpu(check_bfloat16, name, output=tmp_path / "said.txt")


@torch.no_grad()
def check_bfloat16(name: str) -> None:
    """B' is chosen from the clips themselves, in float32, and is the same in both."""
    seeded()
    choose_algorithms(deterministic=False, tf32=False)
    net = VideoNet(backbone(name), stages=stages_of(CASES[name]), sgs=replace(ATFR, after="res2"), probe=NETS[name].probe).eval()
    clips = clips_for(name, 5)
    calibrated(net, clips)
    net, clips = net.to(GPU), clips.to(GPU)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        batch, alone = run(net, clips), [run(net, clip[None]) for clip in clips]
    assert batch.bins == [one.bins[0] for one in alone]
    torch.testing.assert_close(batch.logits.float(), torch.cat([one.logits for one in alone]).float(), rtol=0, atol=0.1)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_deterministic_step_gives_the_same_gradients_twice(name, tmp_path):
    on_gpu(check_gradients, name, output=tmp_path / "said.txt")


def check_gradients(name: str) -> None:
    """Also of the published SGS, whose embedding is learned, and under autocast."""
    seeded()
    choose_algorithms(deterministic=True, tf32=False)
    case = CASES[name]
    for sgs in (None, SGSConfig.from_preset("reference"), replace(ATFR, width=0.3)):
        model = case.build(size=case.size, num_classes=5, dropout=0.0, sgs=sgs).to(GPU)
        clips = torch.randn(3, 3, max(case.frames, 16), 64, 64, device=GPU)
        for dtype in (torch.float32, torch.bfloat16):
            gradients = []
            for _ in range(2):
                model.zero_grad()
                with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
                    logits = model(clips)
                nn.functional.cross_entropy(logits.float(), torch.arange(3, device=GPU), label_smoothing=0.1).backward()
                gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
            torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_the_gradients_of_a_gpu_are_those_of_the_cpu(tmp_path):
    on_gpu(check_against_cpu, output=tmp_path / "said.txt")


def check_against_cpu() -> None:
    seeded()
    choose_algorithms(deterministic=False, tf32=False)
    clips, labels = torch.randn(6, 3, 8, 32, 32).cumsum(dim=2) / 4, torch.arange(6) % 3
    gradients = {}
    for device in ("cpu", GPU):
        torch.manual_seed(0)
        model = x3d(size="tiny", num_classes=3, dropout=0.0, sgs=replace(ATFR, width=0.3))
        lively(model.dense_network, clips)
        model.to(device).train()
        loss = nn.functional.cross_entropy(model(clips.to(device)), labels.to(device))
        loss.backward()
        gradients[device] = torch.cat([p.grad.flatten().cpu() for p in model.parameters()])
    difference = (gradients["cpu"] - gradients[GPU]).norm() / gradients["cpu"].norm()
    assert difference < 1e-3, difference


def test_a_network_that_reads_a_buffer_is_calibrated_on_a_gpu_and_gives_what_it_gives_on_the_cpu(tmp_path):
    on_gpu(check_calibration, output=tmp_path / "said.txt")


class Centred(nn.Module):
    """A network whose forward reads a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(3, 1, 1, 1))
        self.stem, self.trunk = nn.Conv3d(3, 8, 3, padding=1), nn.Conv3d(8, 16, 3, padding=1)
        self.pool, self.head = nn.AdaptiveAvgPool3d(1), nn.Linear(16, 3)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.trunk(self.stem(clips - self.mean).relu()).relu()).flatten(1))


def check_calibration() -> None:
    """Also with a noise floor, which is on the GPU where the clips to calibrate on are gathered on the host."""
    seeded()
    choose_algorithms(deterministic=False, tf32=False)
    clips = torch.randn(6, 3, 16, 32, 32).cumsum(dim=2) / 4
    for options in ({}, {"similarity": "path", "noise_floor": True}):
        found = []
        for device in ("cpu", GPU):
            torch.manual_seed(0)
            model = atfr.add_sgs(Centred(), after="stem", sgs=SGSConfig.from_preset("atfr", **options)).to(device).eval()
            atfr.calibrate(model, clips.to(device), gflops=0.6)
            found.append(model(clips.to(device)).detach().cpu())
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3 * float(found[0].std()))


def test_tf32_is_used_if_asked_for_and_not_otherwise(tmp_path):
    on_gpu(check_tf32, output=tmp_path / "said.txt")


def check_tf32() -> None:
    seeded()
    assert torch.cuda.get_device_capability() >= (8, 0), "this GPU has no TF32"
    x, conv, matrix = torch.randn(2, 64, 8, 16, 16, device=GPU), nn.Conv3d(64, 64, 3, device=GPU), torch.randn(512, 512, device=GPU)
    exact = nn.functional.conv3d(x.double(), conv.weight.double(), conv.bias.double()), matrix.double() @ matrix.double()
    for tf32 in (False, True, False):
        choose_algorithms(deterministic=False, tf32=tf32)
        for found, expected in zip((conv(x), matrix @ matrix), exact):
            error = ((found - expected).norm() / expected.norm()).item()
            assert (error > 1e-5) == tf32, (tf32, error)


@pytest.mark.parametrize("sampled", [False, True])
def test_the_host_waits_for_the_gpu_once_a_step_if_it_samples_and_never_if_not(tmp_path, sampled):
    on_gpu(check_waits, tmp_path, sampled, output=tmp_path / "said.txt")


def check_waits(folder: Path, sampled: bool) -> None:
    seeded()
    model = x3d(size="tiny", num_classes=3, sgs=replace(ATFR, width=0.3) if sampled else None).to(GPU)
    more = {"batches": lambda epoch, start: [], "steps_per_epoch": 9, "dist_info": DistInfo(0, 1, torch.device(GPU))}
    trainer = trainer_of(model, folder, settings=replace(SETTINGS, precision="bf16", log_every=100, clip_norm=1.0, ema=0.9), **more)
    model.train()
    clips = (torch.randn(4, 3, 8, 32, 32).cumsum(dim=2) / 4).pin_memory()
    batch = Batch(clips, torch.zeros(4, dtype=torch.int64).pin_memory(), ("a",) * 4)
    for _ in range(3):  # the first ones set up libraries and plans
        trainer.train_step(batch, epoch=0, data_s=0.0)
    fetched, wait = [], HostCopy.wait  # waits for an event, of which torch does not warn
    HostCopy.wait = lambda copy: fetched.append(1) or wait(copy)
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train_step(batch, epoch=0, data_s=0.0)
    torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
    assert not waits and len(fetched) == int(sampled)


def test_depthwise_kernels_give_what_torch_gives_for_each_clip_alone_in_float64(tmp_path):
    on_gpu(check_depthwise, output=tmp_path / "said.txt")


def check_depthwise() -> None:
    """Also of sizes with more tiles and blocks than the interpreter has time for; each result twice, with the same bits."""
    seeded()
    choose_algorithms(deterministic=False, tf32=False)
    large = [Case(c, (40, 37), (3, 3, 3), (s, s), (1, 1), dtype, F32) for c in (54, 216) for s in (1, 2) for dtype in (F32, torch.bfloat16)]
    for case in [*CONVOLUTIONS, *large]:
        check_against_float64(case, GPU)
    conv = nn.Conv3d(108, 108, 3, padding=1, groups=108, bias=False).to(GPU)
    x = torch.randn(4, 108, 8, 20, 20, device=GPU, requires_grad=True)
    first, second = ([out, *torch.autograd.grad(out.square().sum(), [x, conv.weight])] for out in (depthwise.conv3d(conv, x) for _ in range(2)))
    assert depthwise.takes(conv, x.device, x.dtype) and all(map(torch.equal, first, second))


def test_a_loader_pins_its_batches(small_videos, tmp_path):
    on_gpu(check_pinned, str(next(small_videos.glob("*.mp4"))), output=tmp_path / "said.txt")


def check_pinned(video: str) -> None:
    (batch,) = test_loader(TestClips([Video(video, 0)], settings(), views=1, crops=1), batch_size=1, pin_memory=True)
    assert batch.clips.is_pinned() and batch.labels.is_pinned()


def seeded() -> None:
    random.seed(0)
    torch.manual_seed(0)


def test_prefetched_batches_are_those_of_the_loader(tmp_path):
    on_gpu(check_prefetched, output=tmp_path / "said.txt")


def check_prefetched() -> None:
    batches = [Batch(torch.full((2, 3, 4, 64, 64), number, dtype=torch.uint8).pin_memory(), torch.tensor([number, 0]).pin_memory(), (str(number),) * 2) for number in range(5)]
    for count in (0, 1, 5):
        found = list(prefetched(batches[:count], torch.device(GPU)))
        assert [batch.paths for batch in found] == [batch.paths for batch in batches[:count]]
        for batch, expected in zip(found, batches):
            assert batch.clips.is_cuda and batch.labels.is_cuda
            torch.testing.assert_close((batch.clips.cpu(), batch.labels.cpu()), (expected.clips, expected.labels))
