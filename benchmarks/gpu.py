"""What a GPU makes of the saved FLOPs: networks, kernels, the quickstart, and the tests that need a GPU.

    python benchmarks/gpu.py [--minutes 8] [--sections quickstart kernels networks tests]

Needs no data. Writes benchmarks/results/gpu-NAME.txt and .json after each row, and goes on past a failure. Sections:

- quickstart: the training of `python tools/train.py` (clips a second, and the share of the time in which the GPU is idle).
- kernels: each depthwise convolution of X3D and CSN against cuDNN in both memory formats, and against the time in which
  the GPU copies as many bytes.
- networks: a training step (forward and backward) and inference under bfloat16 autocast. `library` is the network of
  pytorchvideo or torchvision in the faster of both memory formats. `dense` is ours without sampling. `packed` is ours with SGS after
  res2 for B' that are equal, spread evenly from 1 to T, drawn from the quickstart's, or decided by the clips (`own`).
  Efficiency is (1 - time / dense time) / (1 - FLOPs / dense FLOPs). `linear` is the peak memory that would be left if all
  that the dense network adds to the stem's shrank with B'.
- tests: `pytest -m gpu`.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from adaptive_speed import OPTIONS, SUBJECTS, Subject, distributions
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import atfr
from atfr.engine.determinism import choose_algorithms
from atfr.models.backbones.slowfast import slowfast
from atfr.models.backbones.x3d import x3d
from atfr.models.flops import GflopsTable
from atfr.models.graph.tracing import DenseNetwork

ROOT = Path(__file__).resolve().parent.parent
NETWORKS = {
    **SUBJECTS,
    "x3d-M": Subject(lambda sgs: x3d(size="M", num_classes=400, sgs=sgs), (3, 16, 224, 224)),
    "slowfast-R50": Subject(lambda sgs: slowfast(size="8x8-R50", num_classes=400, sgs=sgs), (3, 32, 224, 224)),
}
# Channels, size and spatial stride of the depthwise convolutions; X3D-S has the same channels as X3D-M at 0.71 of its size.
DEPTHWISE = {"X3D-S": (13, ((54, 80, 2), (54, 40, 1), (108, 40, 2), (108, 20, 1), (216, 20, 2), (216, 10, 1), (432, 5, 1))),
             "X3D-M": (16, ((54, 112, 2), (54, 56, 1), (108, 28, 1), (216, 14, 1), (432, 7, 1))),
             "CSN-R101": (32, ((64, 56, 1), (128, 28, 1), (256, 14, 1)))}  # fmt: skip
REPEATS = 7  # of which the median counts, after WARM_UP more
WARM_UP = 3
TESTS_AT_ONCE = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="rows that would start later are left out")
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--batches", nargs="+", type=int, default=[32, 8, 64])
    parser.add_argument("--output", type=Path, help="the .txt file; default: benchmarks/results/gpu-NAME.txt")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: torch sees no GPU; on a CPU use benchmarks/adaptive_speed.py")
    warnings.filterwarnings("ignore")
    choose_algorithms(deterministic=False, tf32=False)
    gpu = torch.cuda.get_device_name()
    report = Report(arguments.output or ROOT / "benchmarks/results" / f"gpu-{re.sub(r'[^a-z0-9]+', '-', gpu.lower())}.txt", minutes=arguments.minutes)
    report.line(f"{gpu}; torch {torch.__version__}; bfloat16 autocast; median of {REPEATS}")
    with tempfile.TemporaryDirectory(prefix="atfr-gpu") as folder:
        for section in arguments.sections:
            report.guarded(section, lambda section=section: SECTIONS[section](report, arguments, Path(folder)))


class Report:
    """Prints lines and writes them to a file, with the figures of each row beside it as JSON."""

    def __init__(self, output: Path, *, minutes: float) -> None:
        self.output, self.end = output, time.monotonic() + 60 * minutes
        self.lines: list[str] = []
        self.rows: list[dict] = []

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def line(self, text: str) -> None:
        print(text, flush=True)
        self.lines.append(text)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.write_text("\n".join(self.lines) + "\n")
        self.output.with_suffix(".json").write_text(json.dumps(self.rows, indent=1) + "\n")

    def row(self, text: str, **figures: object) -> None:
        self.rows.append(figures)
        self.line(text)

    def guarded(self, what: str, run: Callable[[], object]) -> None:
        """Run, and report an exception as a line; leave it out if the time is over."""
        if self.left < 0:
            self.line(f"{what}: not run, the time is over")
            return
        try:
            run()
        except Exception as error:
            traceback.print_exc()
            self.line(f"{what}: FAILED, {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def quickstart(report: Report, arguments: argparse.Namespace, folder: Path) -> None:
    """Train as `python tools/train.py` does, once for the time and once for a trace of some steps."""
    data = f"dataset.root={folder / 'synthetic'}"
    run(report, [sys.executable, "scripts/make_synthetic.py", str(folder / "synthetic")])
    run(report, [sys.executable, "tools/train.py", data, f"trainer.output_dir={folder / 'quickstart'}"])
    logged = [json.loads(line) for line in (folder / "quickstart/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in logged if line["split"] == "train"][1:]  # the first waits for workers and libraries
    step, data_s = (median(line[key] for line in steps) for key in ("step_s", "data_s"))
    total = json.loads((folder / "quickstart/results.json").read_text())
    config = (folder / "quickstart/config.yaml").read_text()
    batch = int(re.search(r"^ +batch_size: (\d+)", config, re.MULTILINE)[1])
    run(report, [sys.executable, "tools/train.py", data, f"trainer.output_dir={folder / 'traced'}", "trainer.max_steps=40", "trainer.profile=20", "trainer.test=false"])
    idle = idle_share(folder / "traced/profile/trace.json")
    report.row(
        f"quickstart: {1e3 * (step + data_s):.1f} ms a step, of which {1e3 * data_s:.1f} wait for data; {batch / (step + data_s):.0f} clips/s;"
        f" the GPU is idle {idle:.0%} of the time; top-1 {total['top1']:.3f}",
        section="quickstart", step_s=step, data_s=data_s, clips_per_second=batch / (step + data_s), idle=idle,
    )  # fmt: skip


def run(report: Report, command: list[str]) -> str:
    """Run a program in the repository's root; its output, or an exception with its last line."""
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=max(report.left, 1))
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:3])}: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    report.line(f"$ python {' '.join(command[1:3])} ...: {time.monotonic() - began:.1f} s")
    return done.stdout


def idle_share(trace: Path) -> float:
    """The share of the traced time, from the first to the last kernel, in which the GPU runs nothing."""
    events = json.loads(trace.read_text())["traceEvents"]
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"))
    busy, end = 0.0, spans[0][0]
    for begin, finish in spans:
        busy += max(finish - max(begin, end), 0)
        end = max(end, finish)
    return 1 - busy / (end - spans[0][0])


def networks(report: Report, arguments: argparse.Namespace, folder: Path) -> None:
    """All ways side by side, for each network, batch size and mode."""
    report.line(f"{'network':<13}{'mode':<10}{'batch':>6}  {'way':<17}{'ms':>9}{'/library':>9}{'/dense':>8}{'FLOPs':>7}{'effic.':>8}{'launches':>10}{'peak GB':>9}{'linear':>8}")
    predictions = folder / "quickstart/predictions.csv"
    for name in arguments.networks:
        report.guarded(name, lambda name=name: network(report, name, arguments.batches, predictions if predictions.exists() else None))
        torch.cuda.empty_cache()


def network(report: Report, name: str, batches: list[int], predictions: Path | None) -> None:
    subject = NETWORKS[name]
    model = subject.build(replace(OPTIONS, width=None, gflops=0.5)).cuda()
    table = model.gflops_table(subject.clip)
    for batch in batches:
        clips = moving_clips(batch, subject.clip)
        atfr.calibrate(model, clips)
        for mode in ("training", "inference"):
            model.train(mode == "training")
            report.guarded(f"{name} {mode} {batch}", lambda mode=mode: rows_of(report, name, mode, model, table, clips, predictions))


def rows_of(report: Report, name: str, mode: str, model: atfr.models.video_net.VideoNet, table: GflopsTable, clips: Tensor, predictions: Path | None) -> None:
    """One row for each way of one network in one mode."""
    batch, training, frames = len(clips), mode == "training", table.frames
    last = clips.contiguous(memory_format=torch.channels_last_3d)
    times: dict[str, float] = {}
    layouts = {"library, NCDHW": torch.contiguous_format, "library, NDHWC": torch.channels_last_3d}
    runs: dict[str, tuple[Callable[[], Tensor], float, float]] = {}  # way -> (the run, FLOPs / dense, mean B' / T)
    for way, layout in layouts.items():
        library = copy.deepcopy(model.dense_network).to(memory_format=layout)
        library.train(training)
        runs[way] = (lambda library=library, x=clips.contiguous(memory_format=layout): library(x)), 1.0, 1.0
    dense = DenseNetwork(model.dense_network)
    runs["dense"] = (lambda: dense(last)), 1.0, 1.0
    for kind, kept in bins_of(batch, table, predictions):
        flops = table.estimate(kept).mean() / table.dense
        forced = [tuple(one[layer] for one in kept) for layer in range(len(frames))]
        runs[f"packed {kind}"] = (lambda forced=forced: model(last, forced)), flops, sum(map(sum, kept)) / batch / sum(frames)
    with torch.no_grad():
        own = model(last, return_sampling=True)[1].bins
    runs["packed own"] = (lambda: model(last)), table.estimate(own).mean() / table.dense, sum(map(sum, own)) / batch / sum(frames)
    stem = peak_of(step_of(lambda: sum(x.float().mean() for x in model.run_stem(last)), training))
    peaks: dict[str, float] = {}
    for way, (forward, flops, kept) in runs.items():
        step = step_of(forward, training)
        seconds, launches, peaks[way] = timed(step), launches_of(step), peak_of(step)
        times[way] = seconds
        library_s = min(times[way] for way in layouts if way in times)
        to_dense = seconds / times["dense"] if "dense" in times else None
        efficiency = (1 - to_dense) / (1 - flops) if to_dense is not None and flops < 0.999 else None
        linear = (stem + (peaks["dense"] - stem) * kept) / 1e9 if way.startswith("packed") else None
        cells = [_cell(value, form) for value, form in ((seconds / library_s, "9.2f"), (to_dense, "8.2f"), (flops, "7.2f"), (efficiency, "8.2f"), (launches, "10d"), (peaks[way] / 1e9, "9.2f"), (linear, "8.2f"))]
        report.row(
            f"{name:<13}{mode:<10}{batch:>6}  {way:<17}{1e3 * seconds:>9.2f}{''.join(cells)}",
            section="networks", network=name, mode=mode, batch=batch, way=way, seconds=seconds, library=seconds / library_s, dense=to_dense, flops=flops,
            efficiency=efficiency, launches=launches, peak_gb=peaks[way] / 1e9, linear_gb=linear,
        )  # fmt: skip


def _cell(value: float | None, form: str) -> str:
    return " " * int(form.split(".")[0].rstrip("d")) if value is None else format(value, form)


def bins_of(batch: int, table: GflopsTable, predictions: Path | None) -> Iterator[tuple[str, list[tuple[int, ...]]]]:
    """B' of each clip, one number a layer, by the name of the distribution."""
    layers = [dict(distributions(batch, frames, least, predictions)) for frames, least in zip(table.frames, table.least)]
    for name, shown in {"equal": "equal", "uniform": "spread", "real": "quickstart"}.items():
        if name in layers[0]:
            yield shown, list(zip(*(layer[name] for layer in layers)))


def moving_clips(batch: int, shape: tuple[int, int, int, int]) -> Tensor:
    """Smooth noise that changes by different amounts, so that the clips keep different B'."""
    generator = torch.Generator("cuda").manual_seed(0)
    channels, frames, height, width = shape
    noise = torch.randn(batch, channels, frames, height // 16, width // 16, device="cuda", generator=generator).cumsum(dim=2)
    noise = noise * torch.linspace(0.05, 1, batch, device="cuda")[:, None, None, None, None]
    return nn.functional.interpolate(noise, size=(frames, height, width), mode="trilinear")


def step_of(forward: Callable[[], Tensor], training: bool) -> Callable[[], None]:
    """A forward pass under autocast, with its backward pass if `training`."""

    def step() -> None:
        with torch.set_grad_enabled(training), torch.autocast("cuda", torch.bfloat16):
            out = forward()
        if training:
            out.float().square().mean().backward()

    return step


def timed(run: Callable[[], object]) -> float:
    """Median seconds on the wall clock, each run waited for."""
    seconds = []
    for _ in range(WARM_UP + REPEATS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return median(seconds[WARM_UP:])


def launches_of(run: Callable[[], object]) -> int:
    """The number of kernels, copies and fills that the GPU runs."""
    with profile(activities=[ProfilerActivity.CUDA]) as done:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in done.events())


def peak_of(run: Callable[[], object]) -> float:
    """Bytes allocated at most, beyond those before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def kernels(report: Report, arguments: argparse.Namespace, folder: Path) -> None:
    """Each depthwise convolution: ours, cuDNN in both formats, and a copy of as many bytes."""
    from atfr.models.packed.kernels import depthwise

    report.line(f"{'depthwise 3x3x3':<34}{'pass':<10}{'ours ms':>9}{'NCDHW':>9}{'NDHWC':>9}{'copy':>9}")
    for name, (frames, shapes) in DEPTHWISE.items():
        for channels, size, stride in shapes:
            label = f"{name} {channels} x {size}², stride {stride}"
            report.guarded(label, lambda c=(label, frames, channels, size, stride): kernel_rows(report, depthwise.conv3d, *c))


def kernel_rows(report: Report, ours: Callable[..., Tensor], label: str, frames: int, channels: int, size: int, stride: int) -> None:
    clips = 32
    module = nn.Conv3d(channels, channels, 3, stride=(1, stride, stride), padding=1, groups=channels, bias=False).cuda().bfloat16()
    plain = torch.randn(clips, channels, frames, size, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    last = plain.detach().contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    found: dict[str, dict[str, float]] = {}
    for way, forward, x in (("ours", ours, last), ("ncdhw", lambda module, x: module(x), plain), ("ndhwc", lambda module, x: module(x), last)):
        out = forward(module, x)
        gradient = torch.randn_like(out)
        with torch.no_grad():
            found.setdefault("forward", {})[way] = timed(lambda: forward(module, x))
        found.setdefault("backward", {})[way] = timed(lambda: torch.autograd.grad(out, (x, module.weight), gradient, retain_graph=True))
    moved = last.numel() + clips * channels * frames * (-(-size // stride)) ** 2  # elements read and written by a forward pass
    source = torch.empty(moved // 2, device="cuda", dtype=torch.bfloat16)
    copied = timed(lambda: source.clone())
    for name, ways in found.items():
        floor = copied if name == "forward" else 2 * copied  # input and output gradient read for both, the input's gradient written
        report.row(
            f"{label:<34}{name:<10}{1e3 * ways['ours']:>9.3f}{1e3 * ways['ncdhw']:>9.3f}{1e3 * ways['ndhwc']:>9.3f}{1e3 * floor:>9.3f}",
            section="kernels", shape=label, direction=name, floor=floor, **ways,
        )  # fmt: skip


def tests(report: Report, arguments: argparse.Namespace, folder: Path) -> None:
    """`pytest -m gpu`."""
    limit = max(report.left, 60)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-vv", "tests/gpu", "-p", "no:cacheprovider", "--timeout", str(int(limit))]
    command += ["-n", str(TESTS_AT_ONCE)] if find_spec("xdist") else []
    output = folder / "tests.txt"  # a file, which is there when time runs out, too
    with open(output, "w") as file:
        try:
            returncode = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            returncode = None
            file.write(f"\nnot finished after {limit:.0f} s\n")
    lines = output.read_text(errors="replace").strip().splitlines()
    for line in lines:
        if line.startswith(("FAILED", "ERROR")) or (returncode is None and " FAILED" in line):  # the second while they run
            report.line(line[:300])
    report.row(f"$ pytest -m gpu: {lines[-1]}", section="tests", returncode=returncode)


SECTIONS = {"quickstart": quickstart, "kernels": kernels, "networks": networks, "tests": tests}

if __name__ == "__main__":
    main()
