"""The peak memory of a training step: packed against dense.

    python benchmarks/training_memory.py [--models x3d-S resnet3d-18] [--batch 8] [--output FILE]

One forward and backward pass in training mode on the CPU; the peak is the most that the allocator
had in use after any operation of it, beyond what was in use before (weights and clips). `share` is of
dense; `linear` is what it would be if all that the trunk adds to the stem's peak shrank with B'. The
early stages, with their large frames, hold more of the memory than of the FLOPs. `again` are the peaks of dense and
packed with `trainer.checkpoint_activations=true`, as shares of dense.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import warnings
from pathlib import Path
from typing import Any, Callable

import torch
from adaptive_speed import OPTIONS, SUBJECTS, distributions
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from atfr.models.flops import GflopsTable
from atfr.models.video_net import VideoNet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SUBJECTS), choices=SUBJECTS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    lines = [f"batch {arguments.batch}; torch {torch.__version__}", f"{'model':<13}{'B-prime':<9}{'dense MB':>10}{'packed MB':>11}{'share':>8}{'linear':>8}{'FLOPs':>8}{'again: dense':>14}{'packed':>8}"]
    print("\n".join(lines), flush=True)
    for name in arguments.models:
        model = SUBJECTS[name].build(OPTIONS).train()
        table = GflopsTable(model, SUBJECTS[name].clip)
        clips = torch.randn(arguments.batch, *SUBJECTS[name].clip).contiguous(memory_format=torch.channels_last_3d)
        dense = peak(lambda: model.dense_network(clips).sum(), model)
        stem = peak(lambda: sum(x.sum() for x in model.run_stem(clips)), model)
        others = VideoNet(model.dense_network, stages={}, sgs=None), copy.deepcopy(model)
        for other in others:
            other.train().prepare(compute_again=True)
        dense_again = peak(lambda: others[0](clips).sum(), others[0])
        for distribution, bins in distributions(arguments.batch, table.frames[0], table.least[0], None):
            packed, again = (peak(lambda: one(clips, [bins]).sum(), one) for one in (model, others[1]))
            kept = sum(bins) / len(bins) / table.frames[0]
            flops = sum(table.at((b,)) for b in bins) / len(bins) / table.dense
            linear = (stem + (dense - stem) * kept) / dense
            lines.append(f"{name:<13}{distribution:<9}{dense / 1e6:>10.1f}{packed / 1e6:>11.1f}{packed / dense:>8.3f}{linear:>8.3f}{flops:>8.3f}{dense_again / dense:>14.3f}{again / dense:>8.3f}")
            print(lines[-1], flush=True)
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n")


def peak(loss: Callable[[], Tensor], model: torch.nn.Module) -> int:
    """Bytes that the allocator had in use at most during a forward and backward pass, beyond those before it."""
    for p in model.parameters():  # gradients are there before and after, so that they count for neither
        p.grad = torch.zeros_like(p)
    gc.collect()
    before, watch = in_use(), Watch()
    with watch:
        loss().backward()
    return watch.most - before


class Watch(TorchDispatchMode):
    """Looks at the allocator after every operation."""

    most = 0

    def __torch_dispatch__(self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.most = max(self.most, in_use())
        return result


def in_use() -> int:
    """Bytes of the process that are allocated and not freed: mallinfo2(3) of glibc."""
    info = _libc.mallinfo2()
    return info.uordblks + info.hblkhd


class _Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]


_libc = ctypes.CDLL("libc.so.6")
_libc.mallinfo2.restype = _Info


if __name__ == "__main__":
    main()
