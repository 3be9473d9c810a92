"""AVLetters from scratch: letters spoken by ten persons, mouths only, where the class is in how things move.

    python studies/claim/avletters.py --kept 4 --methods dense uniform stride atfr atfr-middle-time --seeds 0 1 2
    python studies/claim/avletters.py --protocol repetitions        # the speakers are known, and each fold is a repetition

A tiny R(2+1)D on 16 frames, sampled after its stem, is trained anew for each method, seed and fold; a run takes minutes on one core. Runs are
in runs/claim/avletters; one that is done is not run again. Each video is predicted once a seed, in the fold that leaves its speaker
(or its repetition) out; standard errors are over the ten speakers. Writes studies/claim/avletters*.csv and the tables in
studies/claim/README.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from claim import equally
from claim_report import fill, paired_table
from claim_rows import Predictions, groups_of, read_folds, saved_predictions, write_rows

from atfr.utils.atomic_io import write_text
from atfr.utils.progress import watched

ROOT = Path(__file__).resolve().parents[2]
RUNS, LISTS = Path("runs/claim/avletters"), Path("data/claim/avletters")
FRAMES, FOLDS = 16, (0, 1, 2)
TIME, MIDDLE = "model.sgs.time_embedding=true", "model.sgs.kernel=middle"
PROTOCOLS = ("speakers", "repetitions")
METHODS = {
    "dense": (),
    "uniform": ("model/sgs=uniform",),
    "stride": ("model/sgs=stride",),
    "uniform-time": ("model/sgs=uniform", TIME),
    "stride-time": ("model/sgs=stride", TIME),
    "atfr": ("model/sgs=atfr",),
    "atfr-middle": ("model/sgs=atfr", MIDDLE),
    "atfr-time": ("model/sgs=atfr", TIME),
    "atfr-middle-time": ("model/sgs=atfr", MIDDLE, TIME),
    "glance": ("model/sgs=glance",),
    "glance-time": ("model/sgs=glance", TIME),
    "atfr-equal": ("model/sgs=atfr",),
    "atfr-time-equal": ("model/sgs=atfr", TIME),
    "atfr-middle-time-equal": ("model/sgs=atfr", MIDDLE, TIME),
    "glance-time-equal": ("model/sgs=glance", TIME),
}


@dataclass(frozen=True)
class Video:
    path: str  # LETTER/LETTER+REPETITION_SPEAKER.mp4
    label: str
    group: str  # the speaker
    fold: int


@dataclass(frozen=True)
class Job:
    """One training, tested on one fold."""

    protocol: str
    method: str
    kept: int
    seed: int
    fold: int

    @property
    def folder(self) -> Path:
        return RUNS / self.protocol / (f"{self.method}-{self.kept}" if self.kept else self.method) / f"{self.seed}-{self.fold}"

    def command(self, clips: Path) -> list[str]:
        lists = [f"dataset.{split}={LISTS}/{self.protocol}_{self.fold}_{split}.csv" for split in ("train", "test")]
        model = f"model=r2plus1d{'_sgs' if self.kept else ''}"
        return [
            sys.executable, "tools/train.py", "experiment=claim/avletters", f"dataset.root={clips}", *lists, model, *METHODS[self.method], *self.budget(),
            f"trainer.seed={self.seed}", f"trainer.output_dir={self.folder}",
        ]  # fmt: skip

    def budget(self) -> list[str]:
        """The options that keep `kept` features: on average, or of every clip."""
        if not self.kept:
            return []
        if self.method.endswith("equal"):
            return [*equally(self.kept)]
        return [f"model.sgs.keep_ratio={self.kept / FRAMES}" if self.method.startswith(("atfr", "glance")) else f"model.sgs.num_bins={self.kept}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, default=Path("../shared/data/videos/avletters"), help="folder with the videos and folds.csv (default: %(default)s)")
    parser.add_argument("--protocol", default="speakers", choices=PROTOCOLS, help="what a fold leaves out (default: %(default)s)")
    parser.add_argument("--kept", nargs="+", type=int, default=[4], help="features kept of 16; 4 are .34 of the GFLOPs, 6 are .46 (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--parallel", type=int, default=os.cpu_count(), help="runs at a time, one thread each (default: one a core)")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    lines = read_folds(arguments.clips, way_out="--clips names the folder of the videos with that list")
    videos = [Video(line["relative_path"], line["label"], line["group"], int(line["fold"])) for line in lines]
    write_lists(videos, arguments.protocol)
    wanted = [(method, kept if method != "dense" else 0, seed) for seed in arguments.seeds for method in arguments.methods for kept in arguments.kept]
    jobs = [Job(arguments.protocol, *one, fold) for one in dict.fromkeys(wanted) for fold in FOLDS]
    failed = run_all([job for job in jobs if not (job.folder / "results.json").exists()], arguments.clips, arguments.parallel)
    path = Path(f"studies/claim/avletters{'' if arguments.protocol == 'speakers' else '_repetitions'}.csv")
    rows = saved_predictions(path)
    for method, kept, seed in dict.fromkeys(wanted):
        folds = [Job(arguments.protocol, method, kept, seed, fold).folder for fold in FOLDS]
        if all((folder / "results.json").exists() for folder in folds):
            row = row_of(folds, videos, method=method, kept=kept, seed=seed)
            rows[row.key] = row
    write_rows(path, Predictions, list(rows.values()))
    text = paired_table(list(rows.values()), groups_of(lines))
    fill(Path("studies/claim/README.md"), arguments.protocol, text, script="avletters.py")
    print(text)
    if failed:
        sys.exit("\n".join(failed))


def fold_of(video: Video, protocol: str) -> int:
    return video.fold if protocol == "speakers" else int(Path(video.path).stem[1]) - 1


def write_lists(videos: list[Video], protocol: str) -> None:
    for fold in FOLDS:
        for split in ("train", "test"):
            lines = [f"{video.path},{video.label}\n" for video in videos if (fold_of(video, protocol) == fold) == (split == "test")]
            write_text(LISTS / f"{protocol}_{fold}_{split}.csv", "path,label\n" + "".join(lines))


def run_all(jobs: list[Job], clips: Path, parallel: int) -> list[str]:
    """Train and test; return a line for each job that failed."""
    failed = []
    with ThreadPoolExecutor(parallel) as pool:
        running = {pool.submit(run, job, clips): job for job in jobs}
        for done in watched(as_completed(running), "avletters", unit="run", total=len(jobs)):
            if done.result():
                failed.append(f"failed with exit code {done.result()}: see {running[done].folder}/job.log")
    return failed


def run(job: Job, clips: Path) -> int:
    job.folder.mkdir(parents=True, exist_ok=True)
    with open(job.folder / "job.log", "w") as log:
        return subprocess.run(job.command(clips), stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode


def row_of(folds: list[Path], videos: list[Video], *, method: str, kept: int, seed: int) -> Predictions:
    """Collect the predictions of all folds."""
    right: dict[str, bool] = {}
    for folder in folds:
        with open(folder / "predictions.csv", newline="") as file:
            right.update({"/".join(Path(line["video"]).parts[-2:]): line["label"] == line["prediction"] for line in csv.DictReader(file)})
    results = [json.loads((folder / "results.json").read_text()) for folder in folds]
    share = np.average([r["gflops"]["mean"] / r["gflops"]["dense"] for r in results], weights=[r["num_videos"] for r in results])
    bins = np.average([r["bins"]["mean"] for r in results], weights=[r["num_videos"] for r in results])
    return Predictions("stem" if kept else "", method, kept, seed, float(bins), float(share), "".join("01"[right[video.path]] for video in videos))


if __name__ == "__main__":
    main()
