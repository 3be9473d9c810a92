"""What happens to the frames of a clip once they are read. Everything stays uint8 until the Normalizer.

Randomness comes in as a numpy Generator and nothing else is read, so a clip's augmentation is a function of that
generator's seed; torch's global generator is left as it was. All frames of a clip get the same parameters.
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
    """uint8 [T, C, H, W]: frames of one clip, which torchvision treats as one picture where it measures it."""


def _on_the_whole(function: Callable[..., Tensor]) -> None:
    """Let `function` see all frames of _Frames as one picture: below each other, since it looks at values, not places."""

    @F.register_kernel(function, _Frames)
    def whole(frames: _Frames, *arguments: float, **options: float) -> _Frames:
        steps, channels, height, width = frames.shape
        picture = frames.as_subclass(Tensor).transpose(0, 1).reshape(channels, steps * height, width)
        changed = function(picture, *arguments, **options)
        return changed.reshape(channels, steps, height, width).transpose(0, 1).as_subclass(_Frames)


for _function in (F.adjust_contrast, F.autocontrast, F.equalize):
    _on_the_whole(_function)


class TrainTransform:
    """Random scale, crop, flip and, where asked for, colours and erasing of one clip.

    With `scale` (least and greatest share of the frame's area) the crop is torchvision's RandomResizedCrop with
    aspect ratios in `ratio`; without it, the shorter side is set to a random length in `short_side` (lo, hi; pixels,
    both included) and a square of `crop_size` is cut out at random. `flip` is a probability.

    Then follow, each left out when None, torchvision's RandAugment with `randaugment` (operations, magnitude in 0 to
    30), ColorJitter with `color_jitter` (brightness, contrast, saturation, hue) and RandomErasing with the
    probability `erasing`, which fills a rectangle with `fill` (R, G, B in [0, 255]). All frames are treated the same:
    what is drawn is drawn once, and operations that measure the picture (contrast, equalize) measure the whole clip.
    """

    def __init__(
        self,
        *,
        crop_size: int,
        short_side: tuple[int, int],
        scale: tuple[float, float] | None = None,
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        randaugment: tuple[int, int] | None = None,
        color_jitter: tuple[float, float, float, float] | None = None,
        erasing: float | None = None,
        fill: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        self.short_side = short_side
        self.resized_crop = scale is not None
        crop = v2.RandomResizedCrop(crop_size, scale=scale, ratio=ratio) if scale else v2.RandomCrop(crop_size)
        steps = [crop, v2.RandomHorizontalFlip(flip)]
        if randaugment is not None:
            steps.append(v2.RandAugment(*randaugment, fill=list(fill)))
        if color_jitter is not None:
            steps.append(v2.ColorJitter(*color_jitter))
        if erasing:
            steps.append(v2.RandomErasing(erasing, value=list(fill)))
        # On one [T, C, H, W] tensor torchvision draws once, for all frames.
        self.augment = v2.Compose(steps)

    def draw_short_side(self, rng: np.random.Generator) -> int:
        """The shorter side of this clip, in pixels, so that the decoder can scale the frames to it."""
        low, high = self.short_side
        # A resized crop scales for itself; it should start from as many pixels as are kept.
        return high if self.resized_crop else int(rng.integers(low, high + 1))

    def __call__(self, frames: Tensor, *, short_side: int, rng: np.random.Generator) -> Tensor:
        """uint8 [T, C, H, W] -> uint8 [C, T, crop_size, crop_size]."""
        if not self.resized_crop:
            frames = resize_short_side(frames, short_side)
        with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's global generator
            # torch.manual_seed would also look after other devices, which takes longer than all the rest.
            torch.default_generator.manual_seed(int(rng.integers(2**63)))
            return _to_clip(self.augment(frames.as_subclass(_Frames)).as_subclass(Tensor))


def test_crops(frames: Tensor, *, short_side: int, crop_size: int, crops: int) -> list[Tensor]:
    """The square crops a video is tested on: uint8 [T, C, H, W] -> `crops` times uint8 [C, T, crop_size, crop_size].

    The shorter side is set to `short_side` pixels. One crop is the centre; three are left, centre and right of a
    landscape video, top, centre and bottom of a portrait one.
    """
    if crops not in (1, 3):
        raise ValueError(f"crops is {crops}, it must be 1 or 3")
    if crop_size > short_side:
        raise ValueError(f"crop_size is {crop_size}, more than short_side {short_side}")
    frames = resize_short_side(frames, short_side)
    room_h, room_w = frames.shape[-2] - crop_size, frames.shape[-1] - crop_size
    corners = [(room_h // 2, room_w // 2)]
    if crops == 3:
        along_width = frames.shape[-1] >= frames.shape[-2]
        ends = [(room_h // 2, 0), (room_h // 2, room_w)] if along_width else [(0, room_w // 2), (room_h, room_w // 2)]
        corners = [ends[0], *corners, ends[1]]
    return [_to_clip(frames[..., top : top + crop_size, left : left + crop_size]) for top, left in corners]


# pytest would take the function above for a test wherever it is imported.
test_crops.__test__ = False  # type: ignore[attr-defined]


def resize_short_side(frames: Tensor, short_side: int) -> Tensor:
    """uint8 [T, C, H, W] with the shorter side set to `short_side` pixels, larger or smaller, aspect kept."""
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
    """uint8 [N, C, T, H, W] on any device -> float32, (x / 255 - mean) / std for each channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        centre = torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1, 1)
        spread = torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1, 1)
        # Not persistent: they are settings, a checkpoint must not bring other ones along.
        self.register_buffer("gain", 1 / (255 * spread), persistent=False)
        self.register_buffer("offset", -centre / spread, persistent=False)

    def forward(self, clips: Tensor) -> Tensor:
        # Autocast leaves these alone, and the result is float32 whatever the model runs in.
        return torch.addcmul(self.offset, clips.to(self.gain.dtype), self.gain)


def _to_clip(frames: Tensor) -> Tensor:
    """[T, C, H, W] -> [C, T, H, W] in one block, so that batches can be stacked and pinned."""
    # numpy copies in one thread. Torch spreads even such a small copy over all cores, and on a busy machine waits for
    # them, far longer than all the rest takes.
    return torch.from_numpy(np.ascontiguousarray(frames.numpy().transpose(1, 0, 2, 3)))
