"""Export a checkpoint's network, and check what was exported on real clips.

    python tools/export.py checkpoint=runs/default     # its best.pt, or any file of its checkpoints/
    python tools/export.py checkpoint=... format=onnx

Writes export/model.pt2 (format=torch_export) or export/model.onnx into the checkpoint's run folder,
or into trainer.output_dir. It takes one normalised clip and gives its logits and B'. Clips of the
test split with different B', and one of them with its frames held, go through it and through the
network itself; where the two differ the command ends with exit code 1.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Sequence

import torch
from omegaconf import DictConfig
from torch import Tensor

from atfr.cli import builders, from_checkpoint
from atfr.cli.config import check_root, program
from atfr.data.clips import ClipSettings, TestClips
from atfr.data.transforms import Normalizer
from atfr.data.types import Video
from atfr.engine.distributed.comm import DistInfo
from atfr.models import export
from atfr.models.video_net import VideoNet
from atfr.utils.printable import printable

LOOKED_AT = 24  # clips of the test split among which those with different B' are looked for
CHECKED = 4  # of these, besides those with frames held


@program("export", arguments=from_checkpoint.like_the_checkpoint)
def main(config: DictConfig) -> None:
    check_root(config)
    export.check_format(config.format)
    path, format = from_checkpoint.checkpoint_file(config.checkpoint), config.format
    state = from_checkpoint.read(path)
    file = from_checkpoint.results_folder(path, config.trainer.output_dir) / "export" / export.FILES[format]
    config = from_checkpoint.with_overrides(state, config)
    dist_info, clip = DistInfo(0, 1, torch.device("cpu")), builders.clip_settings(config)
    source = from_checkpoint.test_videos(config, state, path, dist_info)
    model = from_checkpoint.trained_model(config, state, path, dist_info).eval()
    clips = different_clips(model, source.test, clip)
    unchecked = file.with_stem("unchecked")
    run = export.export(model, next(iter(clips.values())), unchecked, format=format)
    table = export.compare(model, run, clips)
    print(export.as_table(table))
    wrong = [row.name for row in table if not row.equal]
    if wrong:
        relative = any(layer.options.scale == "relative" for layer in model.sgs.values())
        why = "; scale=relative magnifies rounding where a clip's frames are alike" if relative else ""
        raise ValueError(f"what was exported differs from the network for {len(wrong)} of {len(table)} clips (first: {wrong[0]}){why}; it is left in {unchecked}")
    os.replace(unchecked, file)
    print(f"exported to {file}: clip [1, 3, {clip.frames}, {clip.crop_size}, {clip.crop_size}] float32, (x / 255 - mean) / std of RGB,")
    print(f"mean={clip.mean}, std={clip.std} -> logits [1, {len(state['class_names'])}], B' of each layer [{len(table[0].bins)}] int64")


@torch.no_grad()
def different_clips(model: VideoNet, videos: Sequence[Video], settings: ClipSettings) -> dict[str, Tensor]:
    """Named test clips [1, 3, T, H, W], normalised, with as many different B' as are found; of one, held frames, too."""
    dataset, normalise = TestClips(videos, settings, views=settings.views, crops=settings.crops), Normalizer(settings.mean, settings.std)
    by_bins: dict[tuple[int, ...], tuple[str, Tensor]] = {}
    others, error = [], ""
    for item in sorted({len(dataset) * i // LOOKED_AT for i in range(LOOKED_AT)}):
        read = dataset[item]
        if read.clip is None:
            error = f" ({read.path}: {read.error})"
            continue
        name = printable(f"{Path(read.path).name} view {read.view} (item {item})")
        named = name, normalise(read.clip[None])
        first = by_bins.setdefault(model(named[1], return_sampling=True)[1].bins[0], named)
        if first is not named and len(others) < CHECKED:
            others.append(named)
    if not by_bins:
        raise ValueError(f"not one test clip could be read to check the export with{error}")
    ladder = [by_bins[bins] for bins in sorted(by_bins)]
    chosen = [ladder[i] for i in sorted({(len(ladder) - 1) * i // (CHECKED - 1) for i in range(CHECKED)})]
    clips, (name, x) = dict([*chosen, *others][:CHECKED]), chosen[-1]
    for hold in sorted({2, -(-settings.frames // 3)}):  # not one frame alone: relative to no distance, scale=relative keeps noise
        clips[f"{name}, each frame held for {hold}"] = x[:, :, torch.arange(settings.frames) // hold * hold]
    return clips


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # there is nothing to save
    main()
