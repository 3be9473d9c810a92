"""The study of docs/results.md: does sampling halve the GFLOPs at no loss of accuracy, and does it beat what costs the same?

    python studies/claim/claim.py --published                         # the runs of studies/claim/rows.csv again, then the report
    python studies/claim/claim.py --networks x3d --data uneven --methods dense atfr-0.4 uniform-6 --seeds 0 1 2
    python studies/claim/claim.py --parallel 50 --through "srun --cpus-per-task=4 --mem=8G"      # on SLURM
    python studies/claim/claim.py                                     # all that it knows, more than a thousand runs
    python studies/claim/claim.py --report-only                       # from what was run before

A run is one of tools/train.py or tools/calibrate.py under runs/claim/DATA-NETWORK/METHOD/SEED. One that was interrupted goes
on where it stopped, one that is done is left alone. Each seed trains a dense network first; every other run of
that seed starts from its weights, and has the same number of further epochs, the dense one as well.
Results go into studies/claim/rows.csv, in the place of those of the same run that it has; the report of all that it has
into docs/results.md and studies/claim/README.md (between their marks).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from claim_probe import RESULT as PROBED
from claim_report import report
from claim_rows import saved
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from tqdm import tqdm

from atfr.cli.config import build

ROOT = Path(__file__).resolve().parents[2]
RUNS = Path("runs", "claim")
FURTHER = 1 / 3  # epochs of every run that starts from it, of those that it had itself
LONGER = {"even": 1, "uneven_long": 1, "distractors": 0.6}  # the same where that is too few, or where it is asked whether it is
FINE_TUNING_LR = 0.02
WARM = "warm"  # the dense network that the other runs of a seed start from


@dataclass(frozen=True)
class Network:
    """What the runs of a network are told, all of which are sampled after the stem unless their method says otherwise."""

    model: str
    size: str
    times_epochs: int = 1  # of those that a dataset's experiment says


NETWORKS = {
    "x3d": Network("x3d", "tiny"),
    "r2plus1d": Network("r2plus1d", "tiny"),
    "resnet3d": Network("resnet3d", "tiny", times_epochs=2),  # after the experiment's six epochs some seeds are in the middle of learning uneven videos
    "resnet3d_18": Network("resnet3d", "18"),  # as the paper has it: its stem is about half as large a part of the whole as the tiny one's
}
KEEP_RATIOS = (0.25, 0.32, 0.34, 0.36, 0.4, 0.5)  # mean B' / T; half of the GFLOPs is .34 of resnet3d's features, .36 of x3d's and .4 of r2plus1d's
KEPT = (2, 3, 4, 5, 6, 7, 8, 11)  # features of 16
BUDGETS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # mean GFLOPs of dense that tools/calibrate.py aims at


@dataclass(frozen=True)
class Method:
    """One row of the study: what `tools/TOOL.py` is told."""

    overrides: tuple[str, ...]
    tool: str = "train"
    start: str | None = WARM  # the run whose weights it starts from; None: from scratch
    after: str | None = "stem"  # the location of the sampling layer; None: the network has none
    briefly: bool = False  # a third of the further epochs that the other runs have
    networks: tuple[str, ...] = tuple(NETWORKS)  # those that have such a location


def sampled(preset: str, *more: str, after: str = "stem", start: str | None = WARM, briefly: bool = False, networks: tuple[str, ...] = tuple(NETWORKS)) -> Method:
    return Method((f"model/sgs={preset}", *more), after=after, start=start, briefly=briefly, networks=networks)


def fixed(preset: str, kept: int, **where: str | None) -> Method:
    return sampled(preset, f"model.sgs.num_bins={kept}", **where)


def untrained(start: str, preset: str, *more: str, after: str = "stem") -> Method:
    return Method((f"model/sgs={preset}", *more, f"budgets={list(BUDGETS)}"), tool="calibrate", start=start, after=after)


def keep_ratio(value: float) -> str:
    return f"model.sgs.keep_ratio={value}"


def equally(kept: int) -> tuple[str, str]:
    """The options that keep `kept` features of every clip, at the best cut."""
    return f"model.sgs.num_bins={kept}", "model.sgs.same_number=true"


AT_HALF = keep_ratio(0.4)  # of the features: with stem and sampling about half of the GFLOPs of r2plus1d
ANCHOR = ("model.sgs.similarity=anchor",)
PATH = ("model.sgs.similarity=path", "model.sgs.noise_floor=true")
FEATURES = "model.sgs.embed_from=features"
DRAWN = "model.sgs.gflops_range=[0.3,1]"  # 0.15 to 1 of the features after the stem
INPUT_DRAWN = "model.sgs.gflops_range=[0.15,1]"  # the same of the input frames
MEAN = "model.sgs.kernel=mean"
TWELVE = "model.sgs.num_bins=12"  # of which the published layer fills about half
REPAIRED = ("model.sgs.edges=inclusive", "model.sgs.kernel=linear_normalized", "model.sgs.order=time")
ABSOLUTE = (*REPAIRED[1:], "model.sgs.scale=absolute", AT_HALF)  # whose bins have no edges to choose
METHODS: dict[str, Method] = {
    WARM: Method((), start=None, after=None),
    "dense": Method((), after=None),
    "none": sampled("identity"),
    # The layer of model/sgs=atfr, and what keeps equally many features of all clips.
    **{f"atfr-{ratio}": sampled("atfr", keep_ratio(ratio)) for ratio in KEEP_RATIOS},
    **{f"{name}-{k}": fixed(name, k) for name in ("uniform", "stride", "random") for k in KEPT},
    # The same with an embedding that learns which change matters, and keeping middle frames.
    **{f"glance-{ratio}": sampled("glance", keep_ratio(ratio)) for ratio in (0.32, 0.36, 0.4)},
    # Cut by content into equally many parts of every clip: where to cut, without how many.
    **{f"equal-{k}": sampled("atfr", *equally(k)) for k in (6, 7)},
    **{f"glance-equal-{k}": sampled("glance", *equally(k)) for k in (6, 7)},
    # Its family, which looks at the features that it samples.
    **{f"features-{ratio}": sampled("atfr", FEATURES, keep_ratio(ratio)) for ratio in (0.32, 0.4)},
    "anchor-0.4": sampled("atfr", FEATURES, *ANCHOR, AT_HALF),
    "path-0.4": sampled("atfr", FEATURES, *PATH, AT_HALF),
    "one-price-0.4": sampled("atfr", FEATURES, "model.sgs.cost_exponent=0", AT_HALF),
    "own-price-0.4": sampled("atfr", FEATURES, "model.sgs.cost_exponent=1", AT_HALF),
    "global-0.4": sampled("atfr", FEATURES, "model.sgs.grid=1", AT_HALF),
    # Its bins, with a z that is learned by the gradient of their kernel, and the same with one that is not.
    **{f"path-{embedding}-0.4": sampled("atfr", FEATURES, *PATH[:1], f"model.sgs.embedding={embedding}", "model.sgs.kernel=linear_normalized", AT_HALF) for embedding in ("mlp", "frozen")},
    # Other locations. Half of the GFLOPs leaves 2 (x3d), 3 (r2plus1d) or 5 (resnet3d) features after res2, and none or 2 (resnet3d) after res3.
    "early-0.37": sampled("atfr", FEATURES, keep_ratio(0.37), after="blocks.0.conv.conv_t", networks=("x3d",)),  # inside the stem, before its temporal convolution
    **{f"input-{ratio}": sampled("atfr", keep_ratio(ratio), after="input") for ratio in (0.32, 0.44)},
    **{f"input-{name}-{k}": fixed(name, k, after="input") for name in ("uniform", "stride") for k in KEPT},
    "res2-0.16": sampled("atfr", keep_ratio(0.16), after="res2"),
    **{f"res2-uniform-{k}": fixed("uniform", k, after="res2") for k in (2, 3, 5, 6)},
    "res3-0.4": sampled("atfr", AT_HALF, after="res3"),
    "res3-uniform-6": fixed("uniform", 6, after="res3"),
    # From scratch.
    "scratch-dense": Method((), start=None, after=None),
    "scratch-0.4": sampled("atfr", AT_HALF, start=None),
    "scratch-uniform-7": fixed("uniform", 7, start=None),
    "scratch-stride-6": fixed("stride", 6, start=None),
    # The published layer, one thing changed, or several.
    **{f"reference-{bins}": sampled("reference", f"model.sgs.num_bins={bins}") for bins in (8, 12)},
    **{f"reference-D{dim}-12": sampled("reference", TWELVE, f"model.sgs.embedding_dim={dim}") for dim in (4, 32)},
    "frozen-12": sampled("frozen", TWELVE),
    "delta-12": sampled("reference", TWELVE, "model.sgs.kernel=delta"),
    "mean-12": sampled("frozen", TWELVE, MEAN),  # no kernel that a learned embedding could learn by
    "time-12": sampled("reference", TWELVE, "model.sgs.order=time"),
    "inclusive-12": sampled("reference", TWELVE, "model.sgs.edges=inclusive"),
    "normalized-12": sampled("reference", TWELVE, "model.sgs.edges=inclusive", "model.sgs.kernel=linear_normalized"),
    "repaired-12": sampled("reference", TWELVE, *REPAIRED),
    "repaired-delta-12": sampled("reference", TWELVE, *REPAIRED, "model.sgs.kernel=delta_normalized"),
    "repaired-magnitude-12": sampled("reference", TWELVE, *REPAIRED, "model.sgs.similarity=magnitude"),
    "absolute-0.4": sampled("reference", *ABSOLUTE),
    "absolute-magnitude-0.4": sampled("reference", *ABSOLUTE, "model.sgs.similarity=magnitude"),
    # One network at many budgets, and no training at all.
    "drawn-0.36": sampled("atfr", DRAWN, keep_ratio(0.36)),
    "budgets-drawn-0.36": untrained("drawn-0.36", "atfr", "refresh_batch_norm=true"),
    "glance-drawn-0.36": sampled("glance", DRAWN, keep_ratio(0.36)),
    "budgets-glance-drawn-0.36": untrained("glance-drawn-0.36", "glance", "refresh_batch_norm=true"),
    "glance-mean-drawn-0.36": sampled("glance", MEAN, DRAWN, keep_ratio(0.36)),
    "budgets-glance-mean-drawn-0.36": untrained("glance-mean-drawn-0.36", "glance", MEAN, "refresh_batch_norm=true"),
    "features-drawn-0.4": sampled("atfr", FEATURES, DRAWN, AT_HALF),
    "budgets-features-drawn-0.4": untrained("features-drawn-0.4", "atfr", FEATURES, "refresh_batch_norm=true"),
    "input-drawn-0.44": sampled("atfr", INPUT_DRAWN, keep_ratio(0.44), after="input"),
    "budgets-input-drawn-0.44": untrained("input-drawn-0.44", "atfr", "refresh_batch_norm=true", after="input"),
    "untrained-atfr": untrained(WARM, "atfr"),
    "untrained-features": untrained(WARM, "atfr", FEATURES),
    "untrained-uniform": untrained(WARM, "uniform"),
    "untrained-stride": untrained(WARM, "stride"),
    # A third of the further epochs.
    "dense-briefly": Method((), after=None, briefly=True),
    "features-briefly": sampled("atfr", FEATURES, AT_HALF, briefly=True),
}


@dataclass(frozen=True)
class Job:
    network: str
    data: str
    method: str
    seed: int

    @property
    def folder(self) -> Path:
        return RUNS / f"{self.data}-{self.network}" / self.method / str(self.seed)

    @property
    def done(self) -> bool:
        return not self.missing()

    def missing(self) -> list[list[str]]:
        """The commands whose results are not there yet."""
        return [command for name, command in self.commands().items() if not complete(self.folder / name)]

    @property
    def needs(self) -> Job | None:
        start = METHODS[self.method].start
        return None if start is None else Job(self.network, self.data, start, self.seed)

    def commands(self) -> dict[str, list[str]]:
        """What is run, one after the other, by the name of the file that it leaves in the folder."""
        method = METHODS[self.method]
        network = NETWORKS[self.network]
        model = (f"model={network.model}_sgs", f"model.sgs.after={method.after}") if method.after else (f"model={network.model}",)
        epochs = config_of(self.data).trainer.epochs * network.times_epochs
        further = max(1, round(epochs * LONGER.get(self.data, FURTHER) * (1 / 3 if method.briefly else 1)))
        if self.needs:
            training = (f"model.weights={self.needs.folder}/checkpoints/last.pt", f"trainer.epochs={further}", f"optimizer.lr={FINE_TUNING_LR}")
        else:  # as many epochs in all
            training = (f"trainer.epochs={epochs if self.method == WARM else epochs + further}",)
        main = [
            sys.executable, f"tools/{method.tool}.py", f"experiment=claim/{self.data}", *model, f"model.size={network.size}", *method.overrides, *training,
            f"trainer.seed={self.seed}", f"trainer.output_dir={self.folder}",
        ]  # fmt: skip
        if method.tool == "calibrate":
            return {"calibration.json": main}
        commands = {"results.json": main}
        if method.after:
            commands[PROBED] = [sys.executable, "studies/claim/claim_probe.py", str(self.folder)]
        return commands


def complete(path: Path) -> bool:
    """Whether the file is there and, of a calibration, has all budgets."""
    return path.exists() and (path.name != "calibration.json" or {entry["budget"] for entry in json.loads(path.read_text())} >= set(BUDGETS))


@cache
def config_of(data: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("train", [f"experiment=claim/{data}", *overrides])


def is_generated(data: str) -> bool:
    return "dwell" in config_of(data).dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--data", nargs="+", default=sorted(path.stem for path in (ROOT / "configs/experiment/claim").glob("*.yaml")), help="files of configs/experiment/claim (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD", help=f"of {', '.join(METHODS)} (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--published", action="store_true", help="exactly the runs of studies/claim/rows.csv, whatever else is chosen")
    parser.add_argument("--clips", type=Path, default=Path("../shared/data/videos"), help="folder of the sets of real clips (default: %(default)s)")
    parser.add_argument("--parallel", type=int, default=os.cpu_count(), help="runs at a time, one thread each (default: one a core)")
    parser.add_argument("--through", default="", help="a command that each run is started with, such as srun and its options")
    parser.add_argument("--report-only", action="store_true")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    failed: list[str] = []
    if not arguments.report_only:
        wanted = published() if arguments.published else [
            Job(network, data, method, seed)
            for seed in arguments.seeds for network in arguments.networks for data in arguments.data for method in arguments.methods
            if network in METHODS[method].networks
        ]  # fmt: skip
        for data in dict.fromkeys(job.data for job in wanted):
            make_data(data, arguments.clips, os.cpu_count() or 1)
        failed = run_all(wanted, parallel=arguments.parallel, through=shlex.split(arguments.through))
    report(RUNS)
    if failed:
        sys.exit("\n".join(failed))


def published() -> list[Job]:
    """The runs that rows.csv has a row of, in its order."""
    jobs = {}
    for row in saved():
        data, _, network = row.data.rpartition("-")
        jobs[Job(network, data, row.method, row.seed)] = None
    return list(jobs)


def make_data(data: str, clips: Path, processes: int) -> None:
    """Generate or copy a dataset that is not there yet, before many runs would at once."""
    dataset = config_of(data).dataset
    if is_generated(data):
        build(dataset, "dataset")
    else:
        copy_videos(clips / Path(dataset.root).name, dataset, processes)


def copy_videos(source: Path, dataset: DictConfig, processes: int) -> None:
    """Make small copies of real videos, and copy their lists last: decoding takes longer than the tiny networks take to learn from a clip."""
    lists = {split: Path(dataset[split]) for split in ("train", "test")}
    if all(file.exists() for file in lists.values()):
        return
    command = [sys.executable, "scripts/prepare.py", "dataset=videolist", *(f"dataset.{split}={file.name}" for split, file in lists.items())]
    copies = [f"root={source}", f"output={dataset.root}", "encode=true", "short_side=64", f"processes={processes}"]
    if subprocess.run([*command, *copies], cwd=ROOT).returncode:
        sys.exit(f"error: {source} could not be copied (above): --clips names the folder of the sets of real clips")


def run_all(wanted: list[Job], *, parallel: int, through: list[str]) -> list[str]:
    """Run what is not done yet and what that starts from; a line for each run that failed."""
    missing: dict[Job, None] = {}
    for job in wanted:
        chain = [job]
        while chain[-1].needs:
            chain.append(chain[-1].needs)
        missing.update({link: None for link in reversed(chain) if not link.done})
    failed: list[str] = []
    begun: set[Job] = set()
    with ThreadPoolExecutor(parallel) as pool, tqdm(total=len(missing), unit="run", desc="claim") as bar:
        running = {}
        while len(begun) < len(missing) or running:
            ready = [job for job in missing if job not in begun and (job.needs is None or job.needs.done)][: parallel - len(running)]
            if not ready and not running:
                failed += [f"not run, since what it starts from failed: {job.folder}" for job in missing if job not in begun]
                break
            for job in ready:
                running[pool.submit(run, job, through)] = job
                begun.add(job)
            ended = next(as_completed(running))
            job = running.pop(ended)
            if ended.result():
                failed.append(f"failed: {job.folder}: {ended.result()}")
            bar.update()
    return failed


def run(job: Job, through: list[str]) -> str:
    """Run one job with its output in its folder's job.log; what went wrong, or nothing."""
    job.folder.mkdir(parents=True, exist_ok=True)
    log = job.folder / "job.log"
    try:
        with open(log, "w") as file:
            for command in job.missing():
                code = subprocess.run([*through, *command], stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
                if code:
                    break
    except OSError as error:  # what it is started through is not there
        return str(error)
    lines = log.read_text(errors="replace").split("\n")
    return "" if code == 0 and job.done else f"exit code {code}, {next((line for line in reversed(lines) if line.strip()), 'no output')} (see {log})"


if __name__ == "__main__":
    main()
