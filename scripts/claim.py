"""The study of docs/claim.md: does sampling halve the GFLOPs at no loss of accuracy, and does it beat what costs the same?

    python scripts/claim.py                                     # all runs that are missing, then the report
    python scripts/claim.py --networks x3d --data uneven --methods dense atfr-0.4 uniform-6 --seeds 0 1 2
    python scripts/claim.py --parallel 50 --through "srun --cpus-per-task=4 --mem=8G"      # on SLURM
    python scripts/claim.py --report-only                       # from what was run before

A run is one of tools/train.py or tools/calibrate.py under runs/claim/DATA-NETWORK/METHOD/SEED. One that was interrupted goes
on where it stopped, one that is done is left alone. Each seed trains a dense network first; every other run of
that seed starts from its weights, and has the same number of further epochs, the dense one as well.
The report goes into docs/claim.md (between its markers), docs/claim.svg and benchmarks/results/claim.csv.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from claim_change import RESULT as PROBED
from claim_report import report
from claim_videos import shrink
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from tqdm import tqdm

from atfr.configuration import build

ROOT = Path(__file__).parent.parent
RUNS = Path("runs", "claim")
WARM = "warm"  # the dense network that the other runs of a seed start from

FURTHER = 1 / 3  # epochs of every run that starts from it, of those that it had itself
LONGER = {"even": 1}  # the same where sampled networks would not be trained to the end
FINE_TUNING_LR = 0.02
NETWORKS = ("x3d", "r2plus1d")  # each in its size `tiny`, sampled after the stem
SHARES = (0.25, 0.32, 0.4, 0.5)  # target mean B' / T
KEPT = (3, 4, 6, 7, 8, 11)  # features of 16
BUDGETS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # mean GFLOPs of dense that tools/calibrate.py aims at


@dataclass(frozen=True)
class Method:
    """One row of the study: what `tools/TOOL.py` is told beyond network, data and seed."""

    overrides: tuple[str, ...]
    tool: str = "train"
    start: str | None = WARM  # the run whose weights it starts from; None: from scratch
    after: str | None = "stem"  # the place of the sampling layer; None: the network has none
    adapts: bool = False  # whether B' has to do with what a clip shows
    briefly: bool = False  # a third of the further epochs that the other runs have


def sampled(preset: str, *more: str, after: str = "stem", start: str | None = WARM, briefly: bool = False) -> Method:
    adapts = preset in ("atfr", "reference", "frozen")
    return Method((f"model/sgs={preset}", *more), after=after, start=start, adapts=adapts, briefly=briefly)


def untrained(start: str, preset: str, *more: str) -> Method:
    return Method((f"model/sgs={preset}", *more, f"budgets={list(BUDGETS)}"), tool="calibrate", start=start)


AT_HALF = "model.sgs.target=0.4"  # of the features: with stem and sampling about half of the GFLOPs
ANCHOR = ("model.sgs.similarity=anchor",)
PATH = ("model.sgs.similarity=path", "model.sgs.noise_floor=true")
REPAIRED = ("model.sgs.edges=inclusive", "model.sgs.kernel=linear_normalized", "model.sgs.order=time")
METHODS: dict[str, Method] = {
    WARM: Method((), start=None, after=None),
    "dense": Method((), after=None),
    **{f"atfr-{share}": sampled("atfr", f"model.sgs.target={share}") for share in SHARES},
    **{f"{name}-{k}": sampled(name, f"model.sgs.num_bins={k}") for name in ("uniform", "stride") for k in KEPT},
    "anchor-0.4": sampled("atfr", *ANCHOR, AT_HALF),
    "reference": sampled("reference"),
    "untrained-atfr": untrained(WARM, "atfr"),
    "untrained-anchor": untrained(WARM, "atfr", *ANCHOR),
    "untrained-uniform": untrained(WARM, "uniform"),
    "untrained-stride": untrained(WARM, "stride"),
    "one-price-0.4": sampled("atfr", "model.sgs.evenness=0", AT_HALF),
    "own-price-0.4": sampled("atfr", "model.sgs.evenness=1", AT_HALF),
    "path-0.4": sampled("atfr", *PATH, AT_HALF),
    "global-0.4": sampled("atfr", "model.sgs.grid=1", AT_HALF),
    "res2-0.4": sampled("atfr", AT_HALF, after="res2"),
    "res3-0.4": sampled("atfr", AT_HALF, after="res3"),
    "scratch-0.4": sampled("atfr", AT_HALF, start=None),
    "scratch-uniform-7": sampled("uniform", "model.sgs.num_bins=7", start=None),
    "none": sampled("none"),
    "random-7": sampled("random", "model.sgs.num_bins=7"),
    "reference-12": sampled("reference", "model.sgs.num_bins=12"),
    "reference-D32-12": sampled("reference", "model.sgs.num_bins=12", "model.sgs.embedding_dim=32"),
    "frozen-12": sampled("frozen", "model.sgs.num_bins=12"),
    "inclusive-12": sampled("reference", "model.sgs.num_bins=12", "model.sgs.edges=inclusive"),
    "normalized-12": sampled("reference", "model.sgs.num_bins=12", "model.sgs.edges=inclusive", "model.sgs.kernel=linear_normalized"),
    "repaired-12": sampled("reference", "model.sgs.num_bins=12", *REPAIRED),
    "repaired-delta-12": sampled("reference", "model.sgs.num_bins=12", *REPAIRED, "model.sgs.kernel=delta_normalized"),
    "repaired-magnitude-12": sampled("reference", "model.sgs.num_bins=12", *REPAIRED, "model.sgs.similarity=magnitude"),
    "drawn-0.4": sampled("atfr", "model.sgs.drawn=[0.15,1]", AT_HALF),
    "budgets-atfr-0.4": untrained("atfr-0.4", "atfr", "refresh_batch_norm=true"),
    "dense-briefly": Method((), after=None, briefly=True),
    "atfr-briefly": sampled("atfr", AT_HALF, briefly=True),
    "budgets-drawn-0.4": untrained("drawn-0.4", "atfr", "refresh_batch_norm=true"),
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
        if METHODS[self.method].tool == "train":
            return (self.folder / "results.json").exists() and (not self.probed or (self.folder / PROBED).exists())
        path = self.folder / "calibration.json"
        return path.exists() and {entry["budget"] for entry in json.loads(path.read_text())} >= set(BUDGETS)

    @property
    def probed(self) -> bool:
        """Whether it is asked how B' follows the change of clips of which that is known."""
        method = METHODS[self.method]
        return method.tool == "train" and method.adapts and is_generated(self.data)

    @property
    def needs(self) -> Job | None:
        start = METHODS[self.method].start
        return None if start is None else Job(self.network, self.data, start, self.seed)

    def commands(self) -> list[list[str]]:
        method = METHODS[self.method]
        model = (f"model={self.network}_sgs", f"model.sgs.after={method.after}") if method.after else (f"model={self.network}",)
        epochs = config_of(self.data).trainer.epochs
        further = max(1, round(epochs * LONGER.get(self.data, FURTHER) * (1 / 3 if method.briefly else 1)))
        if self.needs:
            training = (f"model.weights={self.needs.folder}/checkpoints/last.pt", f"trainer.epochs={further}", f"optimizer.lr={FINE_TUNING_LR}")
        else:  # as many epochs in all
            training = (f"trainer.epochs={epochs if self.method == WARM else epochs + further}",)
        main = [
            sys.executable, f"tools/{method.tool}.py", f"experiment=claim/{self.data}", *model, "model.size=tiny", *method.overrides, *training,
            f"trainer.seed={self.seed}", f"trainer.output_dir={self.folder}",
        ]  # fmt: skip
        probe = [sys.executable, "scripts/claim_change.py", str(self.folder)]
        return [main, probe] if self.probed else [main]


@cache
def config_of(data: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("train", [f"experiment=claim/{data}"])


def is_generated(data: str) -> bool:
    return "dwell" in config_of(data).dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--data", nargs="+", default=["uneven", "even", "ut_interaction", "surveillance_fight"], help="files of configs/experiment/claim (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD", help=f"of {', '.join(METHODS)} (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--clips", type=Path, default=Path("../shared/data/videos"), help="folder of the sets of real clips (default: %(default)s)")
    parser.add_argument("--parallel", type=int, default=os.cpu_count(), help="runs at a time, one thread each (default: one a core)")
    parser.add_argument("--through", default="", help="a command that each run is started with, such as srun and its options")
    parser.add_argument("--report-only", action="store_true")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit('the report needs matplotlib: pip install -e ".[study]"')
    failed: list[str] = []
    if not arguments.report_only:
        wanted = [
            Job(network, data, method, seed)
            for seed in arguments.seeds for network in arguments.networks for data in arguments.data for method in arguments.methods
        ]  # fmt: skip
        for data in arguments.data:
            make_data(data, arguments.clips, os.cpu_count() or 1)
        failed = run_all(wanted, parallel=arguments.parallel, through=shlex.split(arguments.through))
    report(RUNS)
    if failed:
        sys.exit("\n".join(failed))


def make_data(data: str, clips: Path, processes: int) -> None:
    """Generate or copy a dataset that is not there yet, before many runs would at once."""
    dataset = config_of(data).dataset
    if is_generated(data):
        build(dataset, "dataset")
    else:
        shrink(clips / dataset.name, Path(dataset.root), processes=processes)


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
            for command in job.commands():
                code = subprocess.run([*through, *command], stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
                if code:
                    break
    except OSError as error:  # what it is started through is not there
        return str(error)
    lines = log.read_text(errors="replace").split("\n")
    return "" if code == 0 and job.done else f"exit code {code}, {next((line for line in reversed(lines) if line.strip()), 'no output')} (see {log})"


if __name__ == "__main__":
    main()
