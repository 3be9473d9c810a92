"""What sampling saves in time: the last question of the study (studies/claim/claim.py) to each network that samples.

    python studies/claim/claim_speed.py RUN_FOLDER         # writes speed.json

The test clips go through the trained network and, batch for batch, through the same network without the layer. Taken
in turns, both have the same share of a machine on which other runs go on, so that their ratio is one of the study's
figures; clips a second are not, and are here for orientation.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Callable, Iterable

import torch
from claim_trained import CPU, trained
from torch import Tensor

from atfr.cli import builders
from atfr.data.clips import TestClips
from atfr.data.loader import test_loader
from atfr.data.transforms import Normalizer
from atfr.models.graph.tracing import DenseNetwork
from atfr.utils.atomic_io import write_text
from atfr.utils.malloc import keep_freed_memory

RESULT = "speed.json"
LEAST = 40  # batches; a short list of test clips is gone through again


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    keep_freed_memory()  # as training and testing do
    model, config = trained(folder)
    clip = builders.clip_settings(config)
    views = TestClips(builders.load_source(config, CPU).test, clip, views=clip.views, crops=clip.crops)
    loader = test_loader(views, batch_size=config.trainer.batch_size)
    normalise = Normalizer(clip.mean, clip.std)
    batches = [normalise(batch.clips).contiguous(memory_format=torch.channels_last_3d) for batch in loader if batch.clips is not None]
    repeats = -(-LEAST // len(batches))
    sampled, dense = in_turns((model, DenseNetwork(model.dense_network)), batches * repeats)
    clips = repeats * sum(len(batch) for batch in batches) - len(batches[0])  # the first batch does not count
    result = {"time_of_dense": sampled / dense, "clips_per_second": clips / sampled, "dense_clips_per_second": clips / dense, "batch_size": config.trainer.batch_size}
    write_text(folder / RESULT, json.dumps(result) + "\n")
    print(result)


def in_turns(ways: tuple[Callable[[Tensor], object], ...], batches: Iterable[Tensor]) -> list[float]:
    """Seconds that each way takes for all batches, after one that does not count."""
    spent = [0.0] * len(ways)
    with torch.inference_mode():
        for number, batch in enumerate(batches):
            for way, run in enumerate(ways):
                began = time.perf_counter()
                run(batch)
                spent[way] += (time.perf_counter() - began) * (number > 0)
    return spent


if __name__ == "__main__":
    main()
