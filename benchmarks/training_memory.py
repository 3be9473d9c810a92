"""What a training step keeps for its backward pass: packed against dense.

    python benchmarks/training_memory.py [--models x3d-S resnet3d-18] [--batch 8]

Sums the storages that autograd saves in one forward in training mode, each once, parameters left
out: what sets the peak, on any device. `share` is of dense; `linear` is what it would be if every
byte behind SGS shrank with B', which is more than the FLOPs' share where the early stages, with
their large frames, hold more of the memory than of the compute.
"""

from __future__ import annotations

import argparse
import warnings

import torch
from adaptive_speed import OPTIONS, SUBJECTS, distributions

from atfr.engine.accounting import GflopsTable
from atfr.models.network import VideoNet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SUBJECTS), choices=SUBJECTS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, default=64, help="pixels; memory and FLOPs shrink alike")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(f"{'model':<13}{'B-prime':<9}{'dense MB':>10}{'packed MB':>11}{'share':>8}{'linear':>8}{'FLOPs':>8}")
    for name in arguments.models:
        frames, size = SUBJECTS[name].clip[1], arguments.crop
        model = SUBJECTS[name].build(OPTIONS).train()
        table = GflopsTable(model, (3, frames, size, size))
        clips = torch.randn(arguments.batch, 3, frames, size, size)
        dense = saved_bytes(lambda: model.backbone(clips.contiguous(memory_format=torch.channels_last_3d)), model)
        with torch.enable_grad():
            stem = saved_bytes(lambda: model.stem(clips.contiguous(memory_format=torch.channels_last_3d)), model)
        for distribution, bins in distributions(arguments.batch, table.frames[0], table.least[0], None):
            packed = saved_bytes(lambda: model(clips, [bins]), model)
            kept = sum(bins) / len(bins) / table.frames[0]
            flops = sum(table.at((b,)) for b in bins) / len(bins) / table.dense
            linear = (stem + (dense - stem) * kept) / dense
            print(f"{name:<13}{distribution:<9}{dense / 1e6:>10.1f}{packed / 1e6:>11.1f}{packed / dense:>8.3f}{linear:>8.3f}{flops:>8.3f}")


def saved_bytes(run, model: VideoNet) -> int:
    """Bytes of the distinct storages that autograd saves while `run` runs."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other one takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = run()
    del result
    return sum(storage.nbytes() for storage in kept.values())


if __name__ == "__main__":
    main()
