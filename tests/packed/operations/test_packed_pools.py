"""Packed pools against torch's, run on every clip alone."""

from __future__ import annotations

from typing import Callable

import pytest
import torch
from each_clip_alone import FORMATS, LENGTHS, check, each_alone, segments_of
from operation_cases import POOLS
from torch import Tensor, nn

from atfr.models.packed import ops
from atfr.models.packed.segments import Segments

UNPADDED_POOLS = [
    nn.MaxPool3d((2, 1, 1)), nn.MaxPool3d((2, 2, 2), (1, 2, 2)), nn.MaxPool3d((3, 1, 1), (2, 1, 1)),
    nn.AvgPool3d((2, 1, 1), 1), nn.AvgPool3d((2, 2, 2)), nn.AvgPool3d((3, 1, 1), (2, 1, 1), count_include_pad=False),
]  # fmt: skip


def packed_pool(module: nn.Module) -> Callable[[Tensor, Segments], Tensor]:
    run = ops.max_pool if isinstance(module, nn.MaxPool3d) else ops.avg_pool
    return lambda x, segments: run(module, x, segments)


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_a_pool_is_that_of_each_clip(pool, memory):
    for lengths in LENGTHS:
        if ops.window_of(pool).out(min(lengths)) > 0:
            check(packed_pool(pool), pool, lengths, memory)


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("pool", UNPADDED_POOLS, ids=str)
def test_a_pool_without_padding_is_that_of_each_clip(pool, memory):
    for lengths in [(4, 3, 6, 5), (3, 3), (7,), (3, 8, 3)]:
        check(packed_pool(pool), pool, lengths, memory)


def test_a_max_pool_pads_with_nothing_even_where_all_is_negative():
    pool = nn.MaxPool3d((3, 1, 1), 1, (1, 0, 0))
    lengths = (2, 1, 3)
    x = -1 - torch.rand(1, 2, 6, 3, 3)
    expected = torch.cat(each_alone(pool, x, lengths), dim=2)
    assert ops.max_pool(pool, x, segments_of(lengths)).equal(expected) and expected.max() < -1


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize(("size", "grid"), [((32, 48), 4), ((30, 48), 4), ((8, 8), 4), ((16, 16), 1)], ids=["equal cells", "unequal cells", "small cells", "whole"])
def test_frames_are_pooled_as_torch_pools_images(size, grid, memory):
    x = torch.randn(2, 3, 5, *size, dtype=torch.float64).contiguous(memory_format=FORMATS[memory])
    wanted = torch.stack([nn.functional.adaptive_avg_pool2d(clip.transpose(0, 1), grid).flatten(1) for clip in x])  # [N, T, C g g]
    torch.testing.assert_close(ops.framewise_pool(x, grid), wanted, rtol=1e-12, atol=1e-12)
    alone = torch.cat([ops.framewise_pool(x[i : i + 1], grid) for i in range(2)])
    assert torch.equal(ops.framewise_pool(x, grid), alone)
