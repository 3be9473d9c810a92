"""Compile every Triton kernel for a GPU that need not be there, each a test in `test_kernels_for_gpus.py`.

Triton's interpreter takes what its compiler refuses. `PYTHONPATH=. python tests/packed/kernels/kernels_for_gpus.py 90` compiles for compute
capability 9.0 (H100, H200), and launches nothing. It prints the name of each check that passes; `--every` compiles all blocks that tuning tries.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
import traceback
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from atfr.models.packed import ops
from atfr.models.packed.kernels import clips, nearest, rows
from atfr.models.packed.segments import Segments
from atfr.models.sgs.partition_kernel import cut

SHARED = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB that a program may use, by compute capability: CUDA C++ programming guide
LENGTHS = (2, 5, 3)
RUN = JITFunction.run

compiled: list[tuple[str, Any]] = []  # the name and the code of each kernel


class AbsentGPU:
    """What Triton's driver is asked before a launch."""

    def __init__(self, capability: int) -> None:
        self._capability = capability
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED[self._capability] * 1024}


def compile_only(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    code = RUN(kernel, *arguments, grid=grid, warmup=True, **options)
    compiled.append((kernel.fn.__name__, code))
    return code


def compile_configs(every: bool) -> Any:
    def run(tuned: Autotuner, *arguments: Any, **options: Any) -> None:
        tuned.nargs = dict(zip(tuned.arg_names, arguments))
        configs = tuned.prune_configs(options)
        for config in configs if every else configs[:1]:
            tuned.fn.run(*arguments, **options, **config.all_kwargs())

    return run


def features(channels: int, size: int, dtype: torch.dtype) -> Tensor:
    x = torch.empty(1, channels, sum(LENGTHS), size, size, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last_3d).requires_grad_()


def with_gradients(out: Tensor, *inputs: Tensor) -> None:
    torch.autograd.grad(out, inputs, torch.empty_like(out))


def segments() -> Segments:
    return Segments(LENGTHS, max(LENGTHS), torch.zeros(sum(LENGTHS)))


def the_cut() -> None:
    for steps, middle, exponent, given in ((16, False, 0.0, False), (16, True, 0.5, True), (13, False, 1.0, True), (128, False, 0.3, False)):
        frames, times = (torch.full((2,), steps), torch.zeros(2, steps)) if given else (None, None)
        cut(torch.empty(2, steps, 48), width=torch.ones(()), frames=frames, times=times, num_bins=steps, cost_exponent=exponent, middle=middle)


def depthwise_convolutions() -> None:
    bounds = torch.zeros(sum(LENGTHS), 2, dtype=torch.int32)
    cases = [
        (54, (3, 3, 3), 1, torch.bfloat16, bounds, False),
        (54, (3, 3, 3), 2, torch.float16, None, True),
        (24, (5, 1, 1), 1, torch.bfloat16, bounds, False),
        (7, (3, 1, 1), 1, torch.float32, None, False),
    ]
    for channels, kernel, stride, dtype, packed, biased in cases:
        x, weight = features(channels, 8, dtype), torch.empty(channels, 1, *kernel, dtype=dtype, requires_grad=True)
        bias = torch.empty(channels, dtype=dtype) if biased else None
        out, _ = torch.ops.atfr.depthwise3d(x, weight, bias, packed, [stride] * 2, [kernel[1] // 2] * 2)
        with_gradients(out, x, weight)


def aligned_channels_are_loaded_together() -> None:
    for channels, instruction in ((432, "ld.global.v4.b32"), (108, "ld.global.v2.b32")):
        compiled.clear()
        x, weight = features(channels, 8, torch.bfloat16), torch.empty(channels, 1, 3, 3, 3, dtype=torch.bfloat16, requires_grad=True)
        with_gradients(torch.ops.atfr.depthwise3d(x, weight, None, None, [1, 1], [1, 1])[0], x, weight)
        assert {name for name, _ in compiled} == {"_output", "_input_gradient", "_weight_gradient"}
        for name, code in compiled:
            assert instruction in code.asm["ptx"], f"{name} has no {instruction} for {channels} channels"


def moved_frames() -> None:
    plan = ops.layout(LENGTHS, ops.Window(3, padding=1), torch.device("cpu"))
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for relu in (False, True):
            x = features(54, 7, dtype)
            with_gradients(rows.gather_rows(x, *plan.into, 0.0, relu), x)


def normalised_frames() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        statistics = [torch.zeros(54, dtype=torch.promote_types(dtype, torch.float32)) for _ in range(4)]
        x = features(54, 7, dtype).detach()
        rows.normalise_frames(x, torch.arange(10), *statistics, x, 1e-5, True)
        rows.normalise_frames(x, None, *statistics[:2], None, None, None, 1e-5, False)
        rows.add_relu(x, x)


def sums_over_clips() -> None:
    owner, starts = segments().owner, segments().starts
    for dtype, scales in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        x, scale = features(54, 7, dtype), torch.empty(len(LENGTHS), 54, dtype=scales, requires_grad=True)
        with_gradients(clips.clip_means(x, owner, starts), x)
        with_gradients(clips.scale_clips(x, scale, owner, starts), x, scale)


def nearest_features() -> None:
    nearest.nearest_windows(torch.zeros(10), segments().owner, torch.zeros(10), segments().starts, 4.0, 7)


def local_memory(code: Any) -> int:
    """Return the bytes of a program's registers that went to memory."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"LOCAL:(\d+)", usage)[1])


CHECKS = [the_cut, depthwise_convolutions, aligned_channels_are_loaded_together, moved_frames, normalised_frames, sums_over_clips, nearest_features]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("capability", type=int, choices=SHARED)
    parser.add_argument("--every", action="store_true")
    arguments = parser.parse_args()
    driver.set_active(AbsentGPU(arguments.capability))
    with patch.object(JITFunction, "run", compile_only), patch.object(Autotuner, "run", compile_configs(arguments.every)):
        for check in CHECKS:
            compiled.clear()
            try:
                check()
                assert compiled
                for name, code in compiled:
                    assert code.metadata.shared <= SHARED[arguments.capability] * 1024, f"{name} needs {code.metadata.shared} bytes of shared memory"
                    assert not local_memory(code), f"{name} has more values than registers"
                print(f"{check.__name__} passed", flush=True)
            except Exception:
                traceback.print_exc()


if __name__ == "__main__":
    main()
