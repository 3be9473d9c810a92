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
into docs/results.md and studies/claim/README.md (between their marks) and docs/claim.png.
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

from claim_methods import BUDGETS, METHODS, NETWORKS, WARM
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
