"""NaN and infinite values of a clip reach no other clip through any packed operation."""

from __future__ import annotations

import math
from typing import Callable

import pytest
import torch
from each_clip_alone import FORMATS, LENGTHS, clips_of, each_alone, segments_of
from fvcore.nn.squeeze_excitation import SqueezeExcitation
from operation_cases import CONVS, POOLS, identify, non_local
from tiers import slow_but
from torch import Tensor, nn

from atfr.models.packed import ops
from atfr.models.packed.segments import Segments


def check_nothing_leaks(run: Callable[[Tensor, Segments], Tensor], module: nn.Module, bad: float, memory: str) -> None:
    """A clip of `bad` values changes neither the others' outputs nor what flows back to them."""
    for lengths in LENGTHS:
        for spoilt in range(len(lengths)):
            x = clips_of(lengths, memory=memory)
            x.split(lengths, dim=2)[spoilt].fill_(bad)
            x.requires_grad_()
            alone = each_alone(module, x, lengths)
            together = run(x, segments_of(lengths)).split([a.shape[2] for a in alone], dim=2)
            others = [i for i in range(len(lengths)) if i != spoilt]
            if not others:
                continue
            for i in others:
                torch.testing.assert_close(together[i], alone[i], rtol=1e-10, atol=1e-10)
                assert together[i].isfinite().all()
            (expected,) = torch.autograd.grad(sum(alone[i].square().sum() for i in others), x)
            (found,) = torch.autograd.grad(sum(together[i].square().sum() for i in others), x)
            pieces = zip(found.split(lengths, dim=2), expected.split(lengths, dim=2))
            for i, (f, e) in enumerate(pieces):
                if i != spoilt:
                    torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-10)


OPERATIONS = {
    **{f"conv {identify(conv)}": (conv.module, ops.conv3d) for conv in CONVS},
    **{f"{pool}": (lambda pool=pool: pool, ops.max_pool if isinstance(pool, nn.MaxPool3d) else ops.avg_pool) for pool in POOLS},
    "squeeze_excitation": (lambda: SqueezeExcitation(4, 2, is_3d=True).double(), ops.squeeze_excitation),
    **{
        f"non-local {kind} {pool}": (lambda kind=kind, pool=pool: non_local(kind, pool), ops.non_local)
        for kind in ("softmax", "dot_product")
        for pool in (None, (1, 2, 2))
    },
}


@pytest.mark.parametrize("bad", slow_but([torch.nan, torch.inf], math.isnan), ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_not_finite_in_a_clip_reaches_no_other(name, bad):
    build, run = OPERATIONS[name]
    module = build()
    if isinstance(module, nn.MaxPool3d) and ops.window_of(module).out(1) < 1:
        pytest.skip("clips of one feature are too short for it")
    for memory in FORMATS:
        check_nothing_leaks(lambda x, segments: run(module, x, segments), module, bad, memory)
