"""Change that means nothing, as in real video: passing objects, a light that flickers and is switched, and a camera that shakes.

All of it is independent of the class and symmetric under time reversal. Times are in frames and lengths in shares of the
frame's side.
"""

from __future__ import annotations

import colorsys

import numpy as np

from atfr.data.datasets.synthetic_shapes import cover, paint

PASSING = 8  # most objects that pass
SWITCHES = 3  # most times that the light is switched
FLICKER, SWITCHED = 0.12, 0.35  # standard deviation of the logarithm of the brightness: of a frame, and of the time between two switches
SHAKE = 0.05  # standard deviation of the camera's position
GRAIN = 0.024  # standard deviation of the noise, in 0..1


def draw_passing(rng: np.random.Generator, video: np.ndarray, *, amount: float) -> None:
    """Draw pale bars of any size that cross the picture, in place: video float32 [T, H, W, 3] in 0..1, amount 0 (none) to 1."""
    frames, size = video.shape[:2]
    for _ in range(rng.binomial(PASSING, amount)):
        span = int(rng.integers(2, 9))
        begin = int(rng.integers(1 - span, frames))
        time = np.arange(max(begin, 0), min(begin + span, frames))
        along = ((time - begin + 0.5) / span * 1.6 - 0.3) * size  # from outside to outside
        if rng.uniform() < 0.5:
            along = size - along
        across = np.full(len(time), rng.uniform(0.1, 0.9) * size)
        y, x = (along, across) if rng.uniform() < 0.5 else (across, along)
        radius, angle = (np.full(len(time), value) for value in (rng.uniform(0.1, 0.6) * size, rng.uniform(0, np.pi)))
        colour = np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0, 0.4), rng.uniform(0.1, 0.95)))
        paint(video[time[0] : time[-1] + 1], cover("bar", y, x, radius, angle, size), colour)


def film(rng: np.random.Generator, video: np.ndarray, *, amount: float) -> np.ndarray:
    """Return what a bad camera in bad light makes of a video float32 [T, H, W, 3] in 0..1; amount is 0 (a good one) to 1."""
    frames, size = video.shape[:2]
    video = _shaken(rng, video * _light(rng, frames, size, amount)[..., None], amount)
    return video + rng.normal(0.0, GRAIN * amount, video.shape).astype(np.float32)


def _light(rng: np.random.Generator, frames: int, size: int, amount: float) -> np.ndarray:
    """Draw the brightness of each pixel, float32 [T, H, W]: a level, and slopes in y and x."""
    logarithm = FLICKER * amount * rng.normal(size=(frames, 3))  # of the centre, and the slopes in y and x
    for between in np.split(logarithm, np.sort(rng.integers(1, frames, rng.binomial(SWITCHES, amount)))):
        between += SWITCHED * amount * rng.normal(size=3)
    axis = np.linspace(-1, 1, size)
    centre, along_y, along_x = logarithm.T[:, :, None, None]  # [T, 1, 1] each
    brightness = np.exp((centre + along_y * axis[:, None] + along_x * axis).clip(-0.7, 0.4))
    return brightness.astype(np.float32)


def _shaken(rng: np.random.Generator, video: np.ndarray, amount: float) -> np.ndarray:
    """Shift each frame by whole pixels drawn for it; the border repeats its last pixels."""
    frames, size = video.shape[:2]
    shifts = np.rint(rng.normal(0, SHAKE * amount * size, (frames, 2)).clip(-size / 4, size / 4)).astype(int)
    margin = int(np.abs(shifts).max())
    wide = np.pad(video, ((0, 0), (margin, margin), (margin, margin), (0, 0)), mode="edge")
    starts = margin + shifts
    return np.stack([frame[y : y + size, x : x + size] for frame, (y, x) in zip(wide, starts)])
