"""The whole loader against the bare decoder: clips/s on the same files, and the memory of a long run.

    python benchmarks/loader_speed.py [--save]
    python benchmarks/loader_speed.py --videos FOLDER       # with pictures of yours
    python benchmarks/loader_speed.py --clips 16 --memory-clips 64 --files 2 --seconds 2    # does it work?

Videos of 340x256 are written to a temporary folder in four forms: H.264 with a keyframe every 12 frames and every 250,
VP9, and jpg folders. Three read the same frames of the same files at the same size, in as many processes:

- the bare library: PyAV, or Pillow for jpg files, in as few lines as it takes and with no check of anything (`Bare`). It
  trusts the header, seeks once, and decodes on to the last frame; what it decodes is scaled to the size and dropped.
- our reader: `ClipSettings.read` alone, which counts packets, knows every frame by its timestamp and meets bad files.
  It scales jpg files with torchvision, which is quicker than Pillow; loader/reader says what the loader adds to it.
- the loader: reads, transforms and collates training clips as training does, and hands on uint8 batches.

Each figure is the median over the rounds, in which they take turns; loader/bare and loader/reader are those of the ratios
within a round. Start-up is not counted: all read some clips before the clock starts.

Memory is the resident memory of all processes together, while a loader goes over files of all forms.
With --save the result is also written to benchmarks/results/loader_speed-cpu.txt.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import median

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image
from torch import Tensor

from atfr.data.clips import ClipSettings, TrainClips
from atfr.data.loader import TrainSampler, train_loader
from atfr.data.types import Video, VideoError
from atfr.data.video.decode import Decoded, Pick, PickByTime, read_clip
from atfr.data.video.encode import h264_file
from atfr.data.video.readers import scaled_size

RATE, SIZE = 30, (256, 340)  # frames a second; height and width in pixels
BATCH = 8
WARM_UP = 2 * BATCH  # clips a worker before the clock starts
SAVED = Path(__file__).parent / "results" / "loader_speed-cpu.txt"


class Bare(ClipSettings):
    """Reads with the libraries themselves, in files as they are written here."""

    def read(self, path: str, pick: Pick, *, pick_by_time: PickByTime | None = None, short_side: int, key: tuple) -> Decoded:
        read = bare_jpgs if os.path.isdir(path) else bare_video
        return Decoded(read(path, pick, short_side), "bare", 0, RATE)


# The clip of X3D-S in training.
CLIP, BARE = (
    settings(frames=13, stride=6, crop_size=160, train_short_side=[182, 228], test_short_side=182, mean=[0.45] * 3, std=[0.225] * 3)
    for settings in (ClipSettings, Bare)
)


def main() -> None:
    arguments = parse()
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    versions = f"Python {platform.python_version()}, torch {torch.__version__}, PyAV {av.__version__}"
    say(f"{platform.machine()}, {os.cpu_count()} cores, {versions}")
    pictures = f"pictures of {arguments.videos}" if arguments.videos else f"{arguments.seconds:g} s each"
    clip = f"clips of {CLIP.frames} frames x {CLIP.stride}"
    say(f"{arguments.files} files a form, {pictures}; {clip}; {arguments.rounds} rounds of {arguments.clips}")
    with tempfile.TemporaryDirectory(prefix="loader_speed") as folder:
        forms = write_forms(Path(folder), arguments.files, round(RATE * arguments.seconds), arguments.videos)
        say(f"{'clips/s':<14}{'workers':>8}{'bare library':>14}{'our reader':>12}{'loader':>8}{'loader/bare':>13}{'loader/reader':>15}")
        for (form, videos), workers in itertools.product(forms.items(), (1, 2)):
            rounds = [
                (*(reading_speed(videos, arguments.clips, workers, clip) for clip in (BARE, CLIP)), loader_speed(videos, arguments.clips, workers))
                for _ in range(arguments.rounds)
            ]
            bare, reader, loader = (median(column) for column in zip(*rounds))
            ratios = [median(row[2] / row[place] for row in rounds) for place in (0, 1)]
            say(f"{form:<14}{workers:>8}{bare:>14.1f}{reader:>12.1f}{loader:>8.1f}{ratios[0]:>13.2f}{ratios[1]:>15.2f}")
        if arguments.memory_clips:
            for line in memory([video for videos in forms.values() for video in videos], arguments.memory_clips, workers=2):
                say(line)
    if arguments.save:
        SAVED.write_text("\n".join([f"$ python benchmarks/loader_speed.py {' '.join(sys.argv[1:])}", *lines]) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, help="folder of videos whose pictures are used (default: generated ones)")
    parser.add_argument("--files", type=int, default=16, help="files of each form (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10, help="length of the generated videos (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=400, help="clips that are timed in a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-clips", type=int, default=5000, help="clips of the run whose memory is watched (default: %(default)s; 0: none)")
    parser.add_argument("--save", action="store_true", help=f"write {SAVED.relative_to(SAVED.parent.parent.parent)}")
    arguments = parser.parse_args()
    for name in ("files", "clips", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} is {getattr(arguments, name)}, it must be at least 1")
    return arguments


# ---- files


def write_forms(folder: Path, files: int, frames: int, source: Path | None) -> dict[str, list[Video]]:
    """The same pictures in each form."""
    written: dict[str, list[Video]] = {"h264, gop 12": [], "h264, gop 250": [], "vp9": [], "jpg": []}
    pictures = itertools.islice(itertools.cycle(given(source)), files) if source else (generated(frames, seed) for seed in range(files))
    for number, pixels in enumerate(pictures):
        for form, videos in written.items():
            path = folder / f"{form} {number}"
            if form == "jpg":
                write_jpgs(path, pixels)
            elif form == "vp9":
                write_vp9(path, pixels)
            else:
                with h264_file(path, rate=RATE, keyframe=int(form.split()[-1])) as add:
                    for frame in pixels:
                        add(frame)
            videos.append(Video(str(path), number))
    if not all(written.values()):
        sys.exit(f"loader_speed: no video in {source} could be read")
    return written


def generated(frames: int, seed: int) -> np.ndarray:
    """uint8 [T, H, W, 3]: a coarse pattern that drifts, with some noise, so that packets are of a real size."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (18, 24, 3), dtype=np.uint8)).resize((SIZE[1], SIZE[0]), Image.Resampling.BICUBIC)
    base, steps = np.asarray(coarse, np.int16), rng.integers(-3, 4, 2)
    noise = rng.integers(-6, 7, (8, *SIZE, 1), dtype=np.int16)
    return np.stack([(np.roll(base, tuple(steps * t), (0, 1)) + noise[t % 8]).clip(0, 255).astype(np.uint8) for t in range(frames)])


def given(folder: Path) -> Iterator[np.ndarray]:
    """The frames of each video in a folder, the short side 256 or less."""
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".avi", ".mp4", ".webm", ".mkv", ".mov")):
        try:
            frames = read_clip(str(path), lambda num_frames, fps: np.arange(num_frames), short_side=SIZE[0]).frames
        except VideoError as error:
            print(error, file=sys.stderr)
            continue
        yield frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]


def write_vp9(path: Path, pixels: np.ndarray) -> None:
    with av.open(str(path), "w", format="webm") as container:
        stream = container.add_stream("libvpx-vp9", rate=RATE)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"deadline": "realtime", "cpu-used": "8", "crf": "32", "b": "0"}
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def write_jpgs(path: Path, pixels: np.ndarray) -> None:
    path.mkdir()
    for number, frame in enumerate(pixels, start=1):
        Image.fromarray(frame).save(path / f"img_{number:05d}.jpg", quality=90)


# ---- speed


def bare_jpgs(path: str, pick: Pick, short_side: int) -> np.ndarray:
    """uint8 [T, H, W, 3]."""
    files = sorted(os.listdir(path))
    images = (Image.open(os.path.join(path, files[index])) for index in pick(len(files), None))
    return np.stack([image.convert("RGB").resize(scaled_size(*image.size, short_side), Image.Resampling.BILINEAR) for image in images])


def bare_video(path: str, pick: Pick, short_side: int) -> np.ndarray:
    """uint8 [T, H, W, 3]."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        wanted = pick(stream.frames or round(container.duration / av.time_base * RATE), RATE).tolist()
        frames_a_tick = RATE * stream.time_base
        container.seek(int(wanted[0] / frames_a_tick), stream=stream)
        width, height = scaled_size(stream.width, stream.height, short_side)
        reformat = VideoReformatter().reformat
        found: dict[int, np.ndarray] = {}
        for frame in container.decode(stream):
            index = round(frame.pts * frames_a_tick)
            if index in wanted:
                found[index] = reformat(frame, width=width, height=height, format="rgb24", threads=1).to_ndarray()
            if index >= wanted[-1]:
                break
    return np.stack([found[index] for index in wanted])


class OnlyDraws:
    """Stands in for a transform: draws the size at which to read, and drops what was read."""

    def __init__(self, draw_short_side: Callable[[np.random.Generator], int]) -> None:
        self.draw_short_side = draw_short_side

    def __call__(self, frames: Tensor, **_: object) -> Tensor:
        return frames[:0]


def order(clips: int) -> TrainSampler:
    """An order of indices with `clips` clips in an epoch, or a few more to fill the last batch; videos come again in it."""
    return TrainSampler(-(-clips // BATCH) * BATCH, seed=0, global_batch=BATCH)


def reading_speed(videos: list[Video], clips: int, workers: int, settings: ClipSettings) -> float:
    """Clips/s of `workers` processes that read and do nothing else."""
    dataset = TrainClips(videos, settings, seed=0)
    dataset.transform = OnlyDraws(dataset.transform.draw_short_side)
    sampler = order(clips)
    sampler.set_epoch(1)
    batches = list(sampler)
    context = multiprocessing.get_context("fork")  # as the loader's workers
    start, end = (context.Barrier(workers + 1, timeout=3600) for _ in range(2))  # one that dies must not hang the others for ever
    shares = [batches[worker::workers] for worker in range(workers)]
    processes = [context.Process(target=read_only, args=(dataset, share, start, end), daemon=True) for share in shares]
    for process in processes:
        process.start()
    start.wait()
    began = time.perf_counter()
    end.wait()
    seconds = time.perf_counter() - began
    for process in processes:
        process.join()
    return sum(map(len, batches)) / seconds


def read_only(dataset: TrainClips, batches: list[list[tuple[int, int]]], start: Barrier, end: Barrier) -> None:
    torch.set_num_threads(1)
    for index in range(WARM_UP):
        dataset[0, index]
    start.wait()
    for batch in batches:
        for key in batch:
            dataset[key]
    end.wait()


def loader_speed(videos: list[Video], clips: int, workers: int) -> float:
    """Clips/s of the loader with `workers` processes, whose batches are taken and dropped."""
    sampler = order(max(clips, workers * WARM_UP))
    loader = train_loader(TrainClips(videos, CLIP, seed=0), sampler=sampler, workers=workers, timeout_s=120)
    sampler.set_epoch(0, len(sampler) - workers * WARM_UP // BATCH)
    for _ in loader:
        pass
    sampler.set_epoch(1)
    began, count = time.perf_counter(), 0
    for batch in loader:
        count += len(batch)
    return count / (time.perf_counter() - began)


# ---- memory


def memory(videos: list[Video], clips: int, workers: int) -> Iterator[str]:
    """Lines about the resident memory while `clips` clips are loaded: at every tenth of them."""
    sampler = order(clips)
    loader = train_loader(TrainClips(videos, CLIP, seed=0), sampler=sampler, workers=workers, timeout_s=120)
    every = max(1, len(sampler) // 10)
    seen: list[float] = []
    for number, _ in enumerate(loader, start=1):
        if number % every == 0:
            seen.append(resident_mb())
    yield f"memory over {BATCH * len(sampler)} clips with {workers} workers, MB: {' '.join(f'{mb:.0f}' for mb in seen)}"
    # The first tenth still fills caches and allocators.
    early, late = seen[0], max(seen[1:] or seen)
    yield f"growth from the first tenth to the greatest since: {(late - early) / early:+.1%}"


def resident_mb() -> float:
    """Of this process and its children; pages that they share count once for each."""
    processes = [os.getpid(), *(process.pid for process in multiprocessing.active_children())]
    pages = (int(Path(f"/proc/{process}/statm").read_text().split()[1]) for process in processes)
    return sum(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    main()
