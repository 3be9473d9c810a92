"""Is saved compute saved time? Dense, padded, bucketed and packed execution side by side.

    python benchmarks/adaptive_speed.py [--models x3d-S slow-R50] [--batches 1 8 32] [--output FILE]
    python benchmarks/adaptive_speed.py --predictions RUN/predictions.csv    # with the B' of a test, too

Every way runs the same network on the same clips, one after the other in each round, and the median
over the rounds counts. B' are forced: `equal` (T / 2 each), `uniform` (spread from 1 to T), `short`
(one clip in eight keeps T, the others T / 8 to T / 4), and `real`, drawn from a test's predictions.
The time of the sampling layer is in all ways but dense. Per way it prints time / dense,
FLOPs / dense (fvcore's convention, of each clip alone), and efficiency = (1 - time ratio) / (1 -
FLOPs ratio): 1 where every saved FLOP is saved time.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import platform
import random
import time
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Callable, Iterator, NamedTuple

import torch
from torch import Tensor, nn

from atfr.models.backbones.r2plus1d import r2plus1d
from atfr.models.backbones.resnet3d import resnet3d
from atfr.models.backbones.resnets import slow
from atfr.models.backbones.x3d import x3d
from atfr.models.flops import GflopsTable
from atfr.models.graph.tracing import DenseNetwork, Traced
from atfr.models.packed.segments import take
from atfr.models.sgs.config import SGSConfig
from atfr.models.sgs.sampling import sample
from atfr.models.video_net import VideoNet
from atfr.utils.malloc import keep_freed_memory

OPTIONS = SGSConfig.from_preset("atfr", after="res2", width=1.0)
CLIPS_LAST = torch.channels_last_3d


class Subject(NamedTuple):
    build: Callable[[SGSConfig], VideoNet]
    clip: tuple[int, int, int, int]  # (3, T, H, W)


SUBJECTS = {
    "x3d-S": Subject(lambda sgs: x3d(size="S", num_classes=400, sgs=sgs), (3, 13, 160, 160)),
    "slow-R50": Subject(lambda sgs: slow(size="R50", num_classes=400, sgs=sgs), (3, 8, 224, 224)),
    "r2plus1d-18": Subject(lambda sgs: r2plus1d(size="18", num_classes=400, sgs=sgs), (3, 16, 112, 112)),
    "resnet3d-18": Subject(lambda sgs: resnet3d(size="18", num_classes=400, sgs=sgs), (3, 32, 224, 224)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SUBJECTS), choices=SUBJECTS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--after", default="res2", help="the location that is sampled: input, stem, res2 or res3")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="under autocast to bfloat16")
    parser.add_argument("--compile", action="store_true", help="dense and packed once more under torch.compile")
    parser.add_argument("--predictions", type=Path, help="a run folder's predictions.csv, whose B' / T are drawn from")
    parser.add_argument("--fresh-memory", action="store_true", help="on the CPU: leave glibc's defaults, with which large tensors are mapped anew")
    parser.add_argument("--output", type=Path, help="a file for the table and, beside it with .json, the figures")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.backends.cudnn.benchmark = False
    if not arguments.fresh_memory:
        keep_freed_memory()
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    lines = [f"{name}; torch {torch.__version__}; {'bf16' if arguments.bf16 else 'fp32'}; SGS after {arguments.after}; median of {arguments.rounds} rounds", HEADER]
    print("\n".join(lines), flush=True)
    rows = []
    for row in measurements(arguments, device):
        rows.append(row)
        lines.append(as_line(row))
        print(lines[-1], flush=True)
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n")
        arguments.output.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")


HEADER = f"{'model':<13}{'batch':>6}  {'B-prime':<8}{'way':<16}{'ms':>9}{'time/dense':>12}{'FLOPs/dense':>13}{'efficiency':>12}{'sampling/dense':>16}"


def as_line(row: dict) -> str:
    efficiency = "" if row["efficiency"] is None else f"{row['efficiency']:.2f}"
    sampling = "" if row["sampling"] is None else f"{row['sampling']:.1%}"
    return f"{row['model']:<13}{row['batch']:>6}  {row['distribution']:<8}{row['way']:<16}{row['ms']:>9.1f}{row['time']:>12.3f}{row['flops']:>13.3f}{efficiency:>12}{sampling:>16}"


def measurements(arguments: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """One row for each model, batch, distribution and way."""
    for name in arguments.models:
        subject = SUBJECTS[name]
        options = replace(OPTIONS, after=arguments.after)
        model = subject.build(options).to(device).eval()
        table = GflopsTable(model, subject.clip)
        ways = Ways(model, subject.build(replace(options, execution="bucketed")).to(device).eval())
        for batch in arguments.batches:
            clips = torch.randn(batch, *subject.clip, device=device).contiguous(memory_format=CLIPS_LAST)
            for distribution, bins in distributions(batch, table.frames[0], table.least[0], arguments.predictions):
                runs = ways.runs(clips, bins, compiled=arguments.compile)
                context = torch.autocast(device.type, torch.bfloat16) if arguments.bf16 else nullcontext()
                with torch.inference_mode(), context:
                    times = timed(runs, rounds=arguments.rounds, device=device)
                flops = sum(table.at((b,)) for b in bins) / batch / table.dense
                for way, seconds in times.items():
                    if way == "sampling":
                        continue
                    dense = times["dense compiled" if way.endswith("compiled") else "dense"]
                    is_dense = way.startswith(("dense", "source"))
                    ratio, saved = seconds / dense, 1 if is_dense else flops
                    yield {
                        "model": name, "batch": batch, "distribution": distribution, "way": way, "ms": seconds * 1e3, "time": ratio, "flops": saved,
                        "efficiency": None if is_dense or flops > 0.999 else (1 - ratio) / (1 - flops),
                        "sampling": times["sampling"] / times["dense"] if way == "packed" else None,
                    }  # fmt: skip


class Ways:
    """The ways in which one network can run a batch whose clips keep these B'."""

    def __init__(self, model: VideoNet, bucketed: VideoNet) -> None:
        self.model, self.bucketed = model, bucketed
        bucketed.load_state_dict(model.state_dict())
        # As the source library runs it: memory in torch's default order.
        self.source = copy.deepcopy(model.dense_network).to(memory_format=torch.contiguous_format)
        self.dense = DenseNetwork(model.dense_network)
        self.plain = Traced(model.dense_network, model.locations).plain_trunk()
        self._compiled: tuple[nn.Module, nn.Module] | None = None

    def runs(self, clips: Tensor, bins: tuple[int, ...], *, compiled: bool) -> dict[str, Callable[[], object]]:
        model, forced = self.model, [bins]
        with torch.inference_mode():
            features = model.run_stem(clips)
        contiguous = clips.contiguous()
        runs: dict[str, Callable[[], object]] = {
            "dense": lambda: self.dense(clips),
            "source layout": lambda: self.source(contiguous),
            "padded": lambda: self._padded(clips, forced),
            "bucketed": lambda: self.bucketed(clips, forced),
            "packed": lambda: model(clips, forced),
            "sampling": lambda: sample(list(model.sgs.values()), features, [None], forced, clips),
        }
        if compiled:
            if self._compiled is None:
                self._compiled = torch.compile(Traced(model.dense_network, {}).whole()), torch.compile(model.packed_trunk, dynamic=True)
            dense, trunk = self._compiled
            runs["dense compiled"] = lambda: dense(clips)
            runs["packed compiled"] = lambda: trunk(*model.run_stem(clips), forced)
        return runs

    def _padded(self, clips: Tensor, forced: list[tuple[int, ...]]) -> Tensor:
        """Zeros up to the batch's longest clip, as the released code does."""
        (packed,), (done,) = sample(list(self.model.sgs.values()), self.model.run_stem(clips), [None], forced, clips)
        lengths, layout = done.segments.lengths, done.segments.layout
        packed = packed if layout is None else take(packed, layout.kept)
        padded = packed.new_zeros(len(lengths), max(lengths), *packed.permute(0, 2, 3, 4, 1).shape[2:])
        for clip, piece in zip(padded, packed.permute(0, 2, 3, 4, 1)[0].split(lengths)):
            clip[: len(piece)] = piece
        return self.plain(padded.permute(0, 4, 1, 2, 3))


def distributions(batch: int, frames: int, least: int, predictions: Path | None) -> Iterator[tuple[str, tuple[int, ...]]]:
    """B' of each clip of a batch, by name."""

    def fitting(shares: list[float]) -> tuple[int, ...]:
        return tuple(min(frames, max(least, round(share * frames))) for share in shares)

    yield "equal", fitting([0.5] * batch)
    if batch > 1:
        order = random.Random(0).sample(range(batch), batch)
        yield "uniform", tuple(max(least, round(1 + (frames - 1) * i / (batch - 1))) for i in order)
        yield "short", fitting([1.0 if i % 8 == 0 else random.Random(i).uniform(1 / 8, 1 / 4) for i in range(batch)])
    if predictions is not None:
        with open(predictions, newline="") as file:
            kept = [int(row["bins"].split("/")[0]) for row in csv.DictReader(file)]
        whole = json.loads(predictions.with_name("results.json").read_text())["bins"]["frames"]
        yield "real", fitting([random.Random(i).choice(kept) / whole for i in range(batch)])


def timed(runs: dict[str, Callable[[], object]], *, rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each run, all of them in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1 if device.type == "cpu" else rounds + 3):
        for name, run in runs.items():
            wait(device)
            began = time.perf_counter()
            run()
            wait(device)
            seconds[name].append(time.perf_counter() - began)
    return {name: median(values[-rounds:]) for name, values in seconds.items()}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
