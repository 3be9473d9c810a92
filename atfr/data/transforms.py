"""Scale, crop, augment and normalise clips. Everything is uint8 until the Normalizer.

All randomness comes from a numpy Generator; torch's global generator is not changed. All frames of a clip get the same
parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from atfr.data.video.readers import scaled_size


class _Frames(tv_tensors.Video):
    """Frames of a clip, uint8 [T, C, H, W], whose statistics torchvision computes over all frames."""


def _apply_to_whole_clip(function: Callable[..., Tensor]) -> None:
    """Make `function` treat _Frames as one tall image; for functions that do not depend on pixel positions."""

    @F.register_kernel(function, _Frames)
    def whole(frames: _Frames, *arguments: float, **options: float) -> _Frames:
        steps, channels, height, width = frames.shape
        picture = frames.as_subclass(Tensor).transpose(0, 1).reshape(channels, steps * height, width)
        changed = function(picture, *arguments, **options)
        return changed.reshape(channels, steps, height, width).transpose(0, 1).as_subclass(_Frames)


for _function in (F.adjust_contrast, F.autocontrast, F.equalize):
    _apply_to_whole_clip(_function)


class TrainTransform:
    """Crop, flip and augment a training clip at random.

    With `scale` (lo, hi; part of the frame's area) the crop is torchvision's RandomResizedCrop. Without it, the shorter
    side is scaled to a random length in `short_side` (lo, hi; pixels, inclusive), and a square of `crop_size` is cut out
    at a random position. `flip` is a probability.

    Then follow torchvision's RandAugment with `randaugment` (operations, magnitude in 0..30), ColorJitter with
    `color_jitter` (brightness, contrast, saturation, hue) and RandomErasing with probability `erasing` and colour `fill`
    (R, G, B in 0..255); None skips one. Parameters are drawn once per clip, and operations that depend on image
    statistics (contrast, equalize) use those of the whole clip.
    """

    def __init__(
        self,
        *,
        crop_size: int,
        short_side: Sequence[int],
        scale: Sequence[float] | None = None,
        flip: float = 0.5,
        randaugment: Sequence[int] | None = None,
        color_jitter: Sequence[float] | None = None,
        erasing: float | None = None,
        fill: Sequence[int] = (0, 0, 0),
    ) -> None:
        self.short_side = short_side
        self.resized_crop = scale is not None
        crop = v2.RandomResizedCrop(crop_size, scale=scale) if scale else v2.RandomCrop(crop_size)
        steps = [crop, v2.RandomHorizontalFlip(flip)]
        if randaugment is not None:
            steps.append(v2.RandAugment(*randaugment, fill=list(fill)))
        if color_jitter is not None:
            steps.append(v2.ColorJitter(*color_jitter))
        if erasing:
            steps.append(v2.RandomErasing(erasing, value=list(fill)))
        # torchvision draws parameters once per tensor [T, C, H, W].
        self.augment = v2.Compose(steps)

    def draw_short_side(self, rng: np.random.Generator) -> int:
        """Draw the shorter side of a clip in pixels; the decoder scales the frames to it."""
        low, high = self.short_side
        # A resized crop scales itself, and starts from the largest frames.
        return high if self.resized_crop else int(rng.integers(low, high + 1))

    def __call__(self, frames: Tensor, *, short_side: int, rng: np.random.Generator) -> Tensor:
        """Augment uint8 [T, C, H, W] -> uint8 [C, T, crop_size, crop_size]."""
        if not self.resized_crop:
            frames = resize_short_side(frames, short_side)
        with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's global generator
            # torch.manual_seed would also seed other devices, which takes longer than the augmentation.
            torch.default_generator.manual_seed(int(rng.integers(2**63)))
            return _to_clip(self.augment(frames.as_subclass(_Frames)).as_subclass(Tensor))


def test_crops(frames: Tensor, *, short_side: int, crop_size: int, crops: int) -> list[Tensor]:
    """Cut the square crops of a test clip: uint8 [T, C, H, W] -> `crops` tensors, uint8 [C, T, crop_size, crop_size].

    The shorter side is scaled to `short_side` pixels, at least `crop_size`. 1 crop: the centre. 3 crops: left, centre
    and right of a landscape video; top, centre and bottom of a portrait video.
    """
    frames = resize_short_side(frames, short_side)
    room_h, room_w = frames.shape[-2] - crop_size, frames.shape[-1] - crop_size
    corners = [(room_h // 2, room_w // 2)]
    if crops == 3:
        along_width = frames.shape[-1] >= frames.shape[-2]
        ends = [(room_h // 2, 0), (room_h // 2, room_w)] if along_width else [(0, room_w // 2), (room_h, room_w // 2)]
        corners = [ends[0], *corners, ends[1]]
    return [_to_clip(frames[..., top : top + crop_size, left : left + crop_size]) for top, left in corners]


test_crops.__test__ = False  # type: ignore[attr-defined]  # not a pytest test


def resize_short_side(frames: Tensor, short_side: int) -> Tensor:
    """Scale uint8 [T, C, H, W] up or down to a shorter side of `short_side` pixels; keep the aspect ratio."""
    height, width = frames.shape[-2:]
    if min(height, width) == short_side:
        return frames
    if min(height, width) > short_side:
        width, height = scaled_size(width, height, short_side)
    else:
        scale = short_side / min(height, width)
        width, height = round(width * scale), round(height * scale)
    return F.resize(frames, [height, width], antialias=True)


class Normalizer(nn.Module):
    """Normalise uint8 [N, C, T, H, W] to float32: (x / 255 - mean) / std per channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        centre = torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1, 1)
        spread = torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1, 1)
        # Not persistent: these are settings, which a checkpoint must not override.
        self.register_buffer("gain", 1 / (255 * spread), persistent=False)
        self.register_buffer("offset", -centre / spread, persistent=False)

    def forward(self, clips: Tensor) -> Tensor:
        # Autocast does not change addcmul: the result is always float32.
        return torch.addcmul(self.offset, clips.to(self.gain.dtype), self.gain)


def _to_clip(frames: Tensor) -> Tensor:
    """Convert [T, C, H, W] to contiguous [C, T, H, W]."""
    # numpy copies in one thread. torch uses all cores even for such a small copy, which is slow on a busy machine.
    return torch.from_numpy(np.ascontiguousarray(frames.numpy().transpose(1, 0, 2, 3)))
