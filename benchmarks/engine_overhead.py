"""What the trainer adds to a training step, and how long training stands still for a checkpoint.

    python benchmarks/engine_overhead.py [--accelerator cuda] [--steps 30] [--output benchmarks/results/engine_overhead-cpu.txt]

Overhead: steps of the trainer and of a bare loop (forward, backward and optimizer step, nothing else) take turns in
one process, on one network, optimizer and batch of clips, which lie in memory. A trainer's step is all that
happens from one batch to the next: learning rate, seeds, gradient norm, the width's steering, logging, looking at
whether to stop. With two processes the network is in DistributedDataParallel. Given are the median of the bare steps and
that of the differences between each step of the trainer and the bare one before it.

Saving: blocks of 10 steps with a save in them take turns with blocks without one; the difference is what one costs.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from atfr.data.transforms import Normalizer
from atfr.engine.distributed import comm
from atfr.engine.distributed.comm import DistInfo
from atfr.engine.distributed.preemption import StopFlag
from atfr.engine.optim import sgd
from atfr.engine.settings import TrainerSettings
from atfr.engine.trainer import Trainer
from atfr.engine.validation import Validation
from atfr.models.backbones.resnets import slow
from atfr.models.backbones.x3d import x3d
from atfr.models.sgs.config import SGSConfig
from atfr.models.video_net import VideoNet

BLOCK, WARM_UP = 10, 5  # steps
ATFR = SGSConfig.from_preset("atfr", keep_ratio=0.5)
SETTINGS = TrainerSettings(
    output_dir=None, batch_size=1, epochs=1, max_steps=None, seed=0, accelerator="cpu", devices=None, precision="fp32", workers=0, timeout_s=0,
    label_smoothing=0.0, clip_norm=5.0, statistics_clips=0, eval_every=1, save_every=0, log_every=BLOCK, resume=False, test=False,
)  # fmt: skip


@dataclass
class Batch:
    clips: Tensor  # uint8 [N, 3, T, H, W]
    labels: Tensor
    paths: tuple[str, ...]
    bad: tuple[str, ...] = ()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", choices=("cpu", "cuda"), default="cpu", help="cuda: one process on one GPU")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.process:
        in_process(arguments.steps, arguments.accelerator)
        return
    more = " --accelerator cuda" if arguments.accelerator == "cuda" else ""
    lines = [f"$ python benchmarks/{Path(__file__).name}{more} --steps {arguments.steps}"]
    device = torch.cuda.get_device_name() if arguments.accelerator == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores, one thread a process"
    lines += [f"{device}, torch {torch.__version__}; X3D-S, 4 clips a process of 8 x 80 x 80"]
    print("\n".join(lines), flush=True)
    for processes in (1,) if arguments.accelerator == "cuda" else (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", __file__]
        done = subprocess.run([*command, "--process", "--accelerator", arguments.accelerator, "--steps", str(arguments.steps)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            sys.exit(done.stderr)
        found = [line for line in done.stdout.splitlines() if "process" in line]  # the trainer prints, too
        print("\n".join(found), flush=True)
        lines += found
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n")


def in_process(steps: int, accelerator: str) -> None:
    """The measurements of one process, or of one among two."""
    logging.disable(logging.WARNING)  # of waiting for data: the bare loop's turns
    dist_info = comm.start(accelerator=accelerator, devices=None)
    for name, sgs in (("dense", None), ("with SGS", ATFR)):
        torch.manual_seed(0)
        more, bare = overhead(x3d(size="S", num_classes=400, sgs=sgs).to(dist_info.device), steps, dist_info)
        if dist_info.is_main:
            times = f"{1e3 * bare:.1f} ms a step in a bare loop, {1e3 * more:.1f} ms more in the trainer"
            print(f"{dist_info.world} process(es), {name + ':':<10}{times}: {more / bare:+.1%}", flush=True)
    if dist_info.world == 1:
        print(saving(slow(size="R50", num_classes=400).to(dist_info.device), steps, dist_info), flush=True)
    comm.stop()


def overhead(model: VideoNet, steps: int, dist_info: DistInfo) -> tuple[float, float]:
    """How many seconds more a step of the trainer takes than a bare one, and the seconds of that."""
    batch, trainer = batch_of(4, frames=8, size=80), None
    times: dict[str, list[float]] = {"trainer": [], "bare": []}

    def batches(epoch: int, start: int) -> Iterator[Batch]:
        if any(layer.width.isnan() for layer in model.sgs.values()):
            yield batch  # to choose the width by
        for _ in range(steps + 1):  # the end of the last one is not seen from here
            began = now(dist_info)
            bare_step(trainer, batch)
            times["bare"].append(now(dist_info) - began)
            began = now(dist_info)
            yield batch
            times["trainer"].append(now(dist_info) - began)

    with tempfile.TemporaryDirectory(prefix="engine_overhead") as folder:
        trainer = trainer_of(model, batches, steps + 1, dist_info, Path(folder))
        trainer.run()
    pairs = list(zip(times["trainer"], times["bare"]))[WARM_UP:]
    return median(trainer - bare for trainer, bare in pairs), median(bare for _, bare in pairs)


def saving(model: VideoNet, steps: int, dist_info: DistInfo) -> str:
    """What a save costs."""
    batch, times, trainer = batch_of(4, frames=4, size=64), [], None

    def batches(epoch: int, start: int) -> Iterator[Batch]:
        for step in range(2 * steps):
            number, place = divmod(step, BLOCK)
            # At the first step of every other block, so that the writing in the background falls into that block.
            trainer.settings = replace(trainer.settings, save_every=step + 1 if number % 2 and place == 0 else 0)
            began = now(dist_info)
            yield batch
            times.append(now(dist_info) - began)

    with tempfile.TemporaryDirectory(prefix="engine_overhead") as folder:
        trainer = trainer_of(model, batches, 2 * steps, dist_info, Path(folder))
        trainer.run()
        size = trainer.checkpointer.last.stat().st_size
    blocks = [times[i : i + BLOCK] for i in range(BLOCK, len(times) - BLOCK, BLOCK)]  # the first one warms up
    saved, without = blocks[0::2], blocks[1::2]
    step = median(sum(without, []))
    stall = median(block[0] for block in saved) - step
    behind = sum(median(block[i] for block in saved) - step for i in range(1, BLOCK))
    return (
        f"1 process, saving:  Slow-R50, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {size / 1e6:.0f} MB a checkpoint, {1e3 * step:.0f} ms a step:"
        f" the step that saves takes {1e3 * stall:.0f} ms more, the {BLOCK - 1} behind it {1e3 * behind:.0f} ms more together"
    )


def now(dist_info: DistInfo) -> float:
    """Seconds, once the device has done what it was given."""
    if dist_info.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def bare_step(trainer: Trainer, batch: Batch) -> None:
    trainer.optimizer.zero_grad(set_to_none=True)
    device = trainer.dist_info.device
    logits = trainer.forward_backward.network(trainer.normalise(batch.clips.to(device, non_blocking=True)))
    nn.functional.cross_entropy(logits, batch.labels.to(device, non_blocking=True)).backward()
    trainer.optimizer.step()


def trainer_of(model: VideoNet, batches: Callable[[int, int], Iterator[Batch]], steps: int, dist_info: DistInfo, folder: Path) -> Trainer:
    return Trainer(
        model=model,
        optimizer=sgd(model, lr=1e-4, momentum=0.9, weight_decay=1e-5, nesterov=True),
        learning_rate_factor=lambda step, total: 1.0,
        batches=batches,
        steps_per_epoch=steps,
        validate=lambda: Validation({"top1": 0.0}),
        normalise=Normalizer([0.45] * 3, [0.225] * 3).to(dist_info.device),
        settings=replace(SETTINGS, batch_size=4 * dist_info.world),
        dist_info=dist_info,
        folder=folder,
        identity={"config": {}, "choices": {}, "class_names": []},
        stop=StopFlag(),
    )


def batch_of(clips: int, *, frames: int, size: int) -> Batch:
    """Clips of smooth noise that changes by different amounts."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(clips, 3, frames, size // 8, size // 8, generator=generator).cumsum(dim=2) * torch.linspace(5, 40, clips)[:, None, None, None, None]
    x = nn.functional.interpolate(x, scale_factor=(1, 8, 8)) + 128
    x, labels = x.clamp(0, 255).to(torch.uint8), torch.arange(clips)
    return Batch(x.pin_memory(), labels.pin_memory(), ("clip",) * clips) if torch.cuda.is_available() else Batch(x, labels, ("clip",) * clips)


if __name__ == "__main__":
    main()
