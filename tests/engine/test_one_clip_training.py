"""Training on one clip at a time: each batch norm needs more than one value a channel."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from outcomes import run
from pytorchvideo.models.slowfast import create_slowfast
from run_tools import run_tool, small_job
from torch import Tensor, nn
from toy_network import Flip, Toy
from training import SETTINGS

from atfr.cli import builders
from atfr.data.clips import ClipSettings
from atfr.engine.calibration import calibrate_layers, refresh_statistics
from atfr.engine.distributed import comm
from atfr.engine.distributed.comm import DistInfo
from atfr.engine.distributed.sync_batchnorm import sync_batchnorm
from atfr.models.backbones.common import mended
from atfr.models.backbones.r2plus1d import r2plus1d
from atfr.models.backbones.slowfast import STAGES, SlowFast
from atfr.models.backbones.x3d import x3d
from atfr.models.packed.segments import Segments
from atfr.models.sgs.config import SGSConfig
from atfr.models.video_net import VideoNet

# At this width a layer keeps as few features as it may.
ATFR = SGSConfig.from_preset("atfr", after="res2", width=1e6)
LEARNED = SGSConfig.from_preset("reference", similarity="magnitude", scale="absolute", before_activation=False, width=1e6)  # with a batch norm in its embedding
UNIFORM = SGSConfig.from_preset("uniform", keep_ratio=0.01)
REFUSED = ("Expected more than 1 value per channel when training", "cannot be made to keep")  # by torch's batch norm; more features than there are


def x3d_tiny(sgs: SGSConfig | None, **more: object) -> VideoNet:
    return x3d(size="tiny", num_classes=3, sgs=sgs and replace(sgs, **more))


def small_slowfast() -> VideoNet:
    fusion = {"slowfast_fusion_conv_kernel_size": (5, 1, 1), "slowfast_fusion_conv_stride": (4, 1, 1)}
    source = create_slowfast(model_depth=18, stem_dim_outs=(16, 2), model_num_class=3, head_pool=nn.AdaptiveAvgPool3d, head_activation=None, **fusion)
    return VideoNet(SlowFast(mended(source).blocks, alpha=4, fusion="aligned"), stages=STAGES, sgs=ATFR)


class OwnForm(nn.Module):
    """A batch norm in a module with a packed form of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm3d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def packed_forward(self, pair: tuple[Tensor, Segments]) -> tuple[Tensor, Segments]:
        return self.norm(pair[0]), pair[1]


def toy(*second: nn.Module) -> VideoNet:
    """What is behind the sampling sees frames of one pixel."""
    return VideoNet(Toy(nn.Sequential(nn.AdaptiveAvgPool3d((None, 1, 1)), *second)), stages={}, sgs=replace(ATFR, after="first"))


BUILDS = {
    "x3d": lambda: x3d_tiny(ATFR),
    "x3d with a learned embedding": lambda: x3d_tiny(LEARNED, after="res3"),
    "x3d with a baseline": lambda: x3d_tiny(UNIFORM, after="res3"),
    "x3d with a batch norm in the second layer": lambda: x3d_tiny(LEARNED, after=("stem", "res2")),
    "r2plus1d with strides in time": lambda: r2plus1d(size="tiny", num_classes=3, sgs=ATFR),
    "two pathways": small_slowfast,
    "stride of three": lambda: toy(nn.Conv3d(8, 8, (3, 1, 1), stride=(3, 1, 1)), nn.BatchNorm3d(8)),
    "packed form of its own": lambda: toy(OwnForm()),
}


def trains(model: VideoNet, clips: Tensor, kept: tuple[int, ...]) -> bool:
    """Whether torch's batch norms take so many features at each layer."""
    with torch.no_grad():
        try:
            model.run_trunk(*model.run_stem(clips), forced=[(bins,) for bins in kept])
        except ValueError as error:
            assert any(reason in str(error) for reason in REFUSED), error
            return False
    return True


@pytest.mark.parametrize("name", BUILDS)
def test_a_single_clip_keeps_the_fewest_features_that_batch_norm_takes_in_training(name):
    side = 64 if name == "x3d with a batch norm in the second layer" else 32  # at 32 the backbone's batch norms need as many
    model, clip, two = BUILDS[name]().train(), torch.randn(1, 3, 16, side, side), torch.randn(2, 3, 16, side, side)
    (kept,) = run(model, clip).bins
    assert trains(model, clip, kept)
    least = [layer.min_bins for layer in model.sgs.values()]
    for i, bins in enumerate(kept):
        assert bins == least[i] or not trains(model, clip, (*kept[:i], bins - 1, *kept[i + 1 :])), (kept, i)
    assert sum(kept) > sum(least)
    assert run(model, two).bins == run(model.eval(), two).bins
    assert run(model, clip).bins == [tuple(least)]


def test_the_trial_leaves_running_statistics_and_modes_alone_and_runs_once():
    model = x3d_tiny(ATFR).train()
    norm, calls = model.dense_network.blocks[4].res_blocks[0].branch2.norm_a, []
    norm.register_forward_pre_hook(lambda module, inputs: calls.append(module.training))
    for _ in range(2):
        model(torch.randn(1, 3, 16, 32, 32)).sum().backward()
    assert calls.count(True) == norm.num_batches_tracked == 2 and len(calls) < 10
    assert all(module.training for module in model.modules())
    assert norm.weight.grad.isfinite().all()


@pytest.mark.parametrize("side, frozen, kept", [(32, False, 2), (32, True, 1), (64, False, 1)])
def test_no_more_features_are_kept_for_larger_frames_or_frozen_batch_norm(side, frozen, kept):
    model = x3d_tiny(ATFR).train()
    for module in model.modules():
        if frozen and isinstance(module, nn.BatchNorm3d):
            module.eval()
    assert run(model, torch.randn(1, 3, 16, side, side)).bins == [(kept,)]


def test_batch_norm_over_several_processes_has_enough_values_with_one_feature_each(monkeypatch):
    model = x3d_tiny(ATFR).train()
    monkeypatch.setattr(comm, "is_joined", lambda: True)
    monkeypatch.setattr(comm, "summed", lambda value: value.mul_(2))  # another process with the same clip
    with sync_batchnorm(model):
        prediction = run(model, torch.randn(1, 3, 16, 32, 32))
    assert prediction.bins == [(1,)] and prediction.logits.isfinite().all()


def test_statistics_over_single_clips_see_these_clips_alone():
    tried, model = x3d_tiny(LEARNED, width=None, keep_ratio=0.5), x3d_tiny(LEARNED, width=None, keep_ratio=0.5)
    model.load_state_dict(tried.state_dict())
    tried.check_training(16, 32, 32)
    batches = [torch.randn(1, 3, 16, 32, 32).cumsum(dim=2) for _ in range(2)]
    for network in (tried, model):
        calibrate_layers(network, lambda: batches, untrained=True)
        refresh_statistics(network, lambda: batches)
    for (name, one), other in zip(tried.named_buffers(), model.buffers()):
        assert one.isfinite().all() and one.equal(other), name


def test_a_bucketed_network_with_frozen_batch_norm_trains_on_single_clips_as_before():
    model = VideoNet(Toy(nn.Sequential(nn.AdaptiveAvgPool3d((None, 1, 1)), nn.BatchNorm3d(8), Flip())), stages={}, sgs=replace(ATFR, after="first")).train()
    assert model.execution == "bucketed"
    model.dense_network.eval()
    assert run(model, torch.randn(1, 3, 16, 32, 32)).bins == [(1,)]


@pytest.mark.parametrize(
    "build, side, norm",
    [
        (lambda: x3d_tiny(None), 32, "blocks.4"),
        (lambda: x3d_tiny(ATFR), 32, "blocks.4"),
        (lambda: x3d_tiny(LEARNED), 64, "sgs.res2.embedding.norm"),
    ],
    ids=["dense", "sampled", "the layer's own"],
)
def test_a_clip_too_small_for_batch_norm_with_all_its_features_is_refused_with_the_cause(build, side, norm):
    model, clip = build(), torch.randn(1, 3, 1, side, side)
    reason = rf"a clip of 1 frames of {side} x {side} pixels alone gives batch norm '{norm}.* one value a channel.*trainer.batch_size.*dataset.clip.crop_size"
    for check in (lambda: model.check_training(1, side, side), lambda: model(clip)):
        with pytest.raises(ValueError, match=reason) as error:
            check()
        assert "\n" not in str(error.value)
    model.eval()(clip)


@pytest.mark.parametrize(
    "batch_size, world, accumulate, synchronised, refused",
    [
        (1, 1, 1, False, True),
        (2, 1, 1, False, False),
        (2, 1, 2, False, True),
        (3, 1, 2, False, True),  # parts of 2 and 1
        (3, 2, 1, False, True),  # shares of 2 and 1
        (5, 2, 2, False, True),  # parts of 2 and 1, and of 1 and 1
        (4, 2, 1, False, False),
        (2, 2, 1, True, False),
        (1, 1, 1, True, True),
    ],
)
def test_single_clips_are_looked_for_in_all_shares_and_parts_of_a_batch(batch_size, world, accumulate, synchronised, refused):
    settings = replace(SETTINGS, batch_size=batch_size, accumulate=accumulate, sync_batch_norm=synchronised)
    clip = ClipSettings(frames=1, stride=1, crop_size=32, train_short_side=[32, 32], test_short_side=32, mean=[0.5] * 3, std=[0.5] * 3)
    for rank in range(world):  # each process comes to the same answer
        with pytest.raises(ValueError, match="one value a channel") if refused else nullcontext():
            builders.check_batch_norm(x3d_tiny(None), clip, settings, DistInfo(rank, world, torch.device("cpu")))


def test_a_training_that_batch_norm_cannot_do_ends_before_it_starts(small_videos, tmp_path):
    job = small_job(small_videos, tmp_path / "run", "model=x3d", "dataset.clip.frames=1", "trainer.batch_size=1")
    outcome = run_tool("train", *job)
    assert outcome.code == 1 and outcome.err.strip().splitlines()[-1].startswith("error: a clip of 1 frames of 32 x 32 pixels alone gives batch norm")
    assert not (tmp_path / "run").exists()
