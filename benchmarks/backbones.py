"""The table of all backbones with SGS behind res2: cost, exactness and speed of packed execution.

    python benchmarks/backbones.py [--models x3d slow ...] [--batch 4] [--output docs/results.md]

Each network runs the clip it was published with. Written into the file between two marks.

- GFLOPs: fvcore's, one clip, batch norm excluded; T/2: where every SGS layer keeps half of its features.
- alone = batched: the largest difference between a clip's logits alone and in a batch of clips of
  mixed B', in standard deviations of the logits, with batch norms away from their start.
- efficiency: (1 - time ratio) / (1 - FLOPs ratio) of packed against dense execution, both in
  channels-last memory, for B' spread evenly from the least to T.
"""

from __future__ import annotations

import argparse
import platform
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from adaptive_speed import timed
from hydra import compose, initialize_config_dir
from torch import nn

from atfr.cli import builders
from atfr.engine.distributed.comm import DistInfo
from atfr.models.graph.tracing import DenseNetwork
from atfr.models.video_net import VideoNet
from atfr.utils.malloc import keep_freed_memory

ROOT = Path(__file__).parent.parent
NAMES = ("x3d", "slow", "c2d", "i3d", "slowfast", "r2plus1d", "csn", "r3d", "mc3", "s3d", "resnet3d")
SIZES = {"x3d": ("XS", "S", "M", "L", "XL"), "slowfast": ("4x16-R50", "8x8-R50", "8x8-R101"), "r2plus1d": ("R50", "18"), "resnet3d": ("18", "50")}
ENOUGH_S = 3  # seconds of dense execution that a median is taken over, in at most 30 rounds
START, END = "<!-- table -->", "<!-- end of table -->"


class Row(NamedTuple):
    name: str
    clip: str
    least: str
    params: float
    dense: float
    half: float
    error: float
    efficiency: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="of timing at least; a quick network has more (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="a file with the two marks; the table goes between them")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    keep_freed_memory()
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32, batch {arguments.batch}"
    lines = [
        "| network | clip | least B' | parameters (M) | dense GFLOPs | GFLOPs at T/2 | alone = batched | efficiency |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for name in arguments.models:
        for size in SIZES.get(name, (None,)):
            row = measured(name, size, batch=arguments.batch, rounds=arguments.rounds)
            lines.append(
                f"| {row.name} | {row.clip} | {row.least} | {row.params:.2f} | {row.dense:.2f} | {row.half:.2f} | {row.error:.1e} | {row.efficiency:.2f} |"
            )
            print(lines[-1], flush=True)
    if arguments.output:
        text = arguments.output.read_text()
        before, after = text.split(START)[0], text.split(END)[1]
        arguments.output.write_text(f"{before}{START}\n" + "\n".join(lines) + f"\n\nMeasured on {machine}.\n{END}{after}")


def measured(name: str, size: str | None, *, batch: int, rounds: int) -> Row:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("flops", [f"model={name}_sgs", "model.sgs.after=res2", "model.sgs.width=1.0", *([f"model.size='{size}'"] if size else [])])
    clip = builders.clip_settings(config)
    model = builders.build_model(config, num_classes=400, dist_info=DistInfo(0, 1, torch.device("cpu"))).eval()
    shake(model)
    table = builders.gflops_table(model, clip)
    half = table.at(tuple(max(least, frames // 2) for least, frames in zip(table.least, table.frames)))
    forced = [
        tuple(least + (frames - least) * i // max(batch - 1, 1) for i in range(batch)) for least, frames in zip(table.least, table.frames)
    ]
    clips = torch.randn(batch, 3, clip.frames, clip.crop_size, clip.crop_size).contiguous(memory_format=torch.channels_last_3d)
    dense = DenseNetwork(model.dense_network)
    with torch.inference_mode():
        runs = {"dense": lambda: dense(clips), "packed": lambda: model(clips, forced)}
        once = timed(runs, rounds=1, device=clips.device)["dense"]
        times = timed(runs, rounds=max(rounds, min(round(ENOUGH_S / once), 30)), device=clips.device)
        error = alone_error(model, clips[:4], [bins[:4] for bins in forced])
    saved = 1 - sum(table.at(bins) for bins in zip(*forced)) / batch / table.dense
    return Row(
        name=f"{name} {size or config.model.size}",
        clip=f"{clip.frames} x {clip.crop_size}²",
        least="/".join(map(str, table.least)),
        params=sum(p.numel() for p in model.dense_network.parameters()) / 1e6,
        dense=table.dense,
        half=half,
        error=error,
        efficiency=(1 - times["packed"] / times["dense"]) / saved,
    )


def shake(model: VideoNet) -> None:
    """Batch norms as after a training: at their start some multiply by zero, and padding would not be seen."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.2)


def alone_error(model: VideoNet, clips: torch.Tensor, forced: list[tuple[int, ...]]) -> float:
    together = model(clips, forced)
    alone = torch.cat([model(clips[i : i + 1], [bins[i : i + 1] for bins in forced]) for i in range(len(clips))])
    return ((together - alone).abs().max() / together.std()).item()


if __name__ == "__main__":
    main()
