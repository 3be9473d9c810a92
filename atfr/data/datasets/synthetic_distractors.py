"""Change that means nothing, as in real video: passing objects, a light that flickers and is switched, and a camera that shakes.

All of it is independent of the class and symmetric under time reversal. Times are in frames and lengths in shares of the
frame's side.
"""

from __future__ import annotations

import colorsys

import numpy as np

from atfr.data.datasets.synthetic_shapes import cover, paint

PASSING = 4  # most objects that pass
FLICKER = 0.12  # standard deviation of a frame's brightness
SWITCHES, SWITCHED = 2, 0.3  # most times that the light is switched, and the logarithm of the factor
SHAKE = 0.05  # standard deviation of the camera's position
GRAIN = 0.024  # standard deviation of the noise, in 0..1


def distract(rng: np.random.Generator, video: np.ndarray, *, amount: float) -> np.ndarray:
    """Return a video float32 [T, H, W, 3] in 0..1 with distractors; `amount` is 0 (none) to 1."""
    for _ in range(rng.binomial(PASSING, amount)):
        _draw_passing(rng, video)
    video = video * _light(rng, len(video), amount)[:, None, None, None]
    video = _shaken(rng, video, amount)
    return video + rng.normal(0.0, GRAIN * amount, video.shape).astype(np.float32)


def _draw_passing(rng: np.random.Generator, video: np.ndarray) -> None:
    """Draw a pale bar that crosses the picture in front of everything, in place."""
    frames, size = video.shape[:2]
    span = int(rng.integers(3, 10))
    begin = int(rng.integers(1 - span, frames))
    time = np.arange(max(begin, 0), min(begin + span, frames))
    along = ((time - begin + 0.5) / span * 1.6 - 0.3) * size  # from outside to outside
    if rng.uniform() < 0.5:
        along = size - along
    across = np.full(len(time), rng.uniform(0.1, 0.9) * size)
    y, x = (along, across) if rng.uniform() < 0.5 else (across, along)
    radius, angle = (np.full(len(time), value) for value in (rng.uniform(0.08, 0.2) * size, rng.uniform(0, np.pi)))
    colour = np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0, 0.4), rng.uniform(0.1, 0.95)))
    paint(video[time[0] : time[-1] + 1], cover("bar", y, x, radius, angle, size), colour)


def _light(rng: np.random.Generator, frames: int, amount: float) -> np.ndarray:
    """Draw the brightness of each frame, float32 [T], of which the mean is at most 1."""
    logarithm = np.zeros(frames)
    for _ in range(rng.binomial(SWITCHES, amount)):
        logarithm[int(rng.integers(0, frames)) :] += SWITCHED * rng.choice([-1, 1])
    brightness = np.exp(logarithm) * (1 + amount * FLICKER * rng.normal(size=frames))
    return (brightness / max(1.0, brightness.mean())).astype(np.float32)


def _shaken(rng: np.random.Generator, video: np.ndarray, amount: float) -> np.ndarray:
    """Shift each frame by whole pixels drawn for it; the border repeats its last pixels."""
    frames, size = video.shape[:2]
    shifts = np.rint(rng.normal(0, SHAKE * amount * size, (frames, 2)).clip(-size / 4, size / 4)).astype(int)
    margin = int(np.abs(shifts).max())
    wide = np.pad(video, ((0, 0), (margin, margin), (margin, margin), (0, 0)), mode="edge")
    starts = margin + shifts
    return np.stack([frame[y : y + size, x : x + size] for frame, (y, x) in zip(wide, starts)])
