"""A packed forward pass launches about as many kernels as a dense one, and gives cuDNN the shapes of batches."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from launches import Launches, launches
from tiers import slow_but

from atfr.models.factory import create_model
from atfr.models.sgs.config import SGSConfig
from atfr.models.video_net import VideoNet

# Frames of a clip, and features at each layer.
NETWORKS = {"x3d_tiny": (16, [16]), "x3d_s": (16, [16]), "slow_r50": (16, [16]), "r2plus1d_18": (16, [16]), "resnet3d_18": (16, [16]), "slowfast_8x8_r50": (32, [8, 32])}
LARGE = ("x3d_s", "slow_r50", "r2plus1d_18", "slowfast_8x8_r50")
NAMES = [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in NETWORKS]
BOUND = 1.1  # of the launches of the dense network, without those of the sampling


@lru_cache(maxsize=None)
def networks(name: str) -> tuple[VideoNet, VideoNet]:
    """A dense and a packed network without values."""
    with torch.device("meta"):
        return create_model(name, 5), create_model(name, 5, sgs=SGSConfig.from_preset("atfr"))


def spread(frames: int) -> tuple[int, ...]:
    """B' of eight clips, evenly."""
    return tuple(max(1, i * frames // 8) for i in range(1, 9))


@lru_cache(maxsize=8)
def counted(name: str, *, training: bool, triton: bool) -> tuple[Launches, Launches]:
    dense, packed = networks(name)
    frames, features = NETWORKS[name]
    shape = (8, 3, frames, 64, 64)
    forced = [spread(count) for count in features]
    return launches(dense, shape, None, training=training, triton=triton), launches(packed, shape, forced, training=training, triton=triton)


@pytest.mark.parametrize("name", slow_but(NAMES, "x3d_tiny".__eq__))
def test_packed_clips_take_about_as_many_launches_as_dense_ones(name):
    for training in (True, False):
        dense, packed = counted(name, training=training, triton=True)
        # A depthwise convolution over time takes clips as they are; where it is torch's, it moves them in and out.
        moves = sum(groups > 1 and kernel[2] > 1 for _, kernel, groups in packed.convolutions) * (2 if training else 1)
        found, bound = packed.network.total() - moves, dense.network.total() * BOUND
        assert found <= bound, f"{found} launches, and the dense network has {dense.network.total()}: {packed.network - dense.network}"


@pytest.mark.parametrize("name", NAMES)
def test_no_convolution_over_time_is_given_all_clips_as_one(name):
    for triton in (True, False):
        _, packed = counted(name, training=False, triton=triton)
        over_time = [(x, kernel) for x, kernel, _ in packed.convolutions if kernel[2] > 1]
        kernels = triton and name.startswith("x3d")  # all of its convolutions over time are depthwise
        assert bool(over_time) != kernels and all(x[0] > 1 for x, _ in over_time)
