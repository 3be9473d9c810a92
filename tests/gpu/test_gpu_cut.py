"""The cut as one Triton kernel on a GPU."""

from __future__ import annotations

import pytest
import torch
from devices import on_gpu
from partition_checks import CHECKS, seeded

from atfr.models.packed.kernels.support import triton_runs
from atfr.models.sgs.partition import MOST_FRAMES, best_cuts

pytestmark = pytest.mark.gpu
GPU = "cuda:0"


@pytest.mark.parametrize("name", CHECKS)
def test_the_kernel_on_a_gpu_cuts_like_the_plain_functions_and_like_a_trial_of_all_cuts(name, tmp_path):
    on_gpu(check_on_gpu, name, output=tmp_path / "said.txt")


def check_on_gpu(name: str) -> None:
    assert triton_runs(torch.device(GPU)), "this GPU is too old for Triton, or Triton is missing"
    torch.backends.cuda.matmul.allow_tf32 = False
    seeded(name, GPU)


@pytest.mark.parametrize("steps, dim", [(32, 48), (64, 48), (MOST_FRAMES, 1024)])
def test_long_clips_of_many_features_cost_on_a_gpu_what_they_cost_on_the_cpu(steps, dim, tmp_path):
    on_gpu(check_long, steps, dim, output=tmp_path / "said.txt")


def check_long(steps: int, dim: int) -> None:
    from atfr.models.sgs.partition_kernel import cut

    torch.manual_seed(0)
    z, frames = torch.randn(64, steps, dim), torch.randint(steps // 2, steps + 1, (64,))
    z = z.masked_fill(torch.arange(steps)[None, :, None] >= frames[:, None, None], 0)
    done = cut(z.to(GPU), width=torch.tensor(0.5, device=GPU), frames=frames.to(GPU), num_bins=steps, cost_exponent=0.5)
    expected, _ = best_cuts(z.double(), frames, num_bins=steps)
    torch.testing.assert_close(done.least.cpu().double(), expected, rtol=1e-4, atol=1e-5 * expected[:, 0].max().item())
    assert ((done.weights > 0).sum(dim=(1, 2)).cpu() == frames).all()
