"""SlowFast's two ways to fuse pathways that SGS has shortened: how far do they stray from dense?

    python benchmarks/fusion_rules.py

Clips hold each of their pictures for some frames, so that merging frames that are alike loses little:
what is left of the difference to the dense network's logits comes from which Fast features a Slow one
meets, and from temporal convolutions seeing shortened clips. Weights are untrained, batch norms have
the clips' dense statistics, and widths are calibrated to keep half of the features. Prints the median
distance to the dense logits over clips, relative to their spread.
"""

from __future__ import annotations

import warnings

import torch
from backbones import shake

from atfr.engine.calibration import calibrate_layers, precise_batch_norm
from atfr.models.backbones.slowfast import FUSION_RULES, slowfast
from atfr.models.sgs.config import SGSConfig


def main() -> None:
    warnings.filterwarnings("ignore")
    clips = held_clips(24)
    for after in ("res2", "fast.res2", "slow.res2"):
        for rule in FUSION_RULES:
            torch.manual_seed(0)
            model = slowfast(size="8x8-R50", num_classes=50, fusion=rule, sgs=SGSConfig.from_preset("atfr", after=after, keep_ratio=0.5)).eval()
            shake(model)
            precise_batch_norm(model, [clips], forward=model.dense_network)
            calibrate_layers(model, lambda: [clips])
            with torch.inference_mode():
                dense = torch.cat([model.dense_network(clip[None]) for clip in clips])
                logits, sampling = model(clips, return_sampling=True)
            distance = (logits - dense).norm(dim=1) / (dense - dense.mean(dim=0)).norm(dim=1)
            bins = [sum(kept) / len(kept) for kept in zip(*sampling.bins)]
            print(f"{after:<10} {rule:<9} distance to dense {distance.median():.3f}, mean B' " + ", ".join(f"{b:.1f} of {t}" for b, t in zip(bins, sampling.frames)))


def held_clips(count: int, frames: int = 32, size: int = 64) -> torch.Tensor:
    """[N, 3, T, H, W]: 3 to 8 smooth pictures a clip, each held for a random number of frames."""
    random = torch.Generator().manual_seed(0)
    clips = torch.empty(count, 3, frames, size, size)
    for clip in clips:
        pictures = int(torch.randint(3, 9, (), generator=random))
        changes = torch.randperm(frames - 1, generator=random)[: pictures - 1].sort().values + 1
        held = torch.bucketize(torch.arange(frames), changes, right=True)
        coarse = torch.randn(3, pictures, 8, 8, generator=random)
        pictured = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
        clip.copy_(pictured[:, held])
    return clips


if __name__ == "__main__":
    main()
