"""Scenes of the built-in dataset: an object that goes through four phases in some order.

A clip shows a textured background. At the onset an object appears. It is a disc, a square, a cross and a ring in some
order, each exactly once, and then disappears. The class is the order. Only a temporal model can recognise it:

- all classes have the same phases, with durations that do not depend on the class, so shuffled frames contain no
  information about the class;
- each phase is first, second, third and last in equally many classes, so a single frame tells little, even with its time;
- the set of classes and all motion are symmetric under time reversal, so a model that sorts shuffled frames by their
  motion still confuses two classes.

With distractors, most of what changes from frame to frame has nothing to do with the object's phases.

Times are in frames, lengths in pixels and colours in 0..1 unless stated otherwise.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np

from atfr.data.datasets.synthetic_distractors import draw_passing, film
from atfr.data.datasets.synthetic_shapes import cover, paint

PHASES: tuple[str, ...] = ("disc", "square", "cross", "ring")
HUES: tuple[float, ...] = (0.0, 0.33, 0.62, 0.15)  # of each phase, in 0..1 as in colorsys

# Disc and square are at the ends and cross and ring in the middle, or the reverse; each pair in both orders.
# The index is the label. Class names are in alphabetical order, like those read from lists.
ORDERS: tuple[tuple[int, ...], ...] = (
    (2, 0, 1, 3), (2, 1, 0, 3), (0, 2, 3, 1), (0, 3, 2, 1),
    (3, 0, 1, 2), (3, 1, 0, 2), (1, 2, 3, 0), (1, 3, 2, 0),
)  # fmt: skip
CLASSES: tuple[str, ...] = tuple("-".join(PHASES[phase] for phase in order) for order in ORDERS)
assert list(CLASSES) == sorted(CLASSES)

WINDOW = 31  # video frames spanned by a clip of 16 frames at stride 2
MIN_DWELL = 3  # video frames: at stride 2, a phase has at least one or two frames of the clip
BRIEF_DWELL = 2  # MIN_DWELL for dwell="brief": at stride 2, a phase has at least one frame of the clip
MIN_SLACK = 6  # least number of video frames to distribute unevenly over the phases
DWELLS: tuple[str, ...] = ("uneven", "even", "brief")
SPLITS: tuple[str, ...] = ("train", "test")

CONCENTRATION = 0.3  # of the Dirichlet distribution of the slack; if small, one phase gets most of it
SCENES = 3  # most times that the background is another one from a frame on, with distractors
NOISE = 0.006  # standard deviation of the sensor noise; pixels are in 0..1
VISIBLE = 0.55  # least mean absolute change (grey levels of 255) of a visible step


@dataclass(frozen=True)
class Timeline:
    """First frames of the phases. The object is visible in frames `starts[0]` to `end` - 1."""

    starts: tuple[int, ...]
    end: int

    @property
    def dwells(self) -> tuple[int, ...]:
        """Length of each phase in frames, in order."""
        bounds = (*self.starts, self.end)
        return tuple(after - before for before, after in zip(bounds, bounds[1:]))


@dataclass(frozen=True)
class Truth:
    """Ground truth of a clip."""

    label: int
    timeline: Timeline
    busyness: float  # 0 (static between the events) to 1: scales motion and clutter
    change: float  # mean absolute change per step, in grey levels of 255
    changed_steps: int  # number of steps from one frame to the next with a visible change
    distractors: float  # 0 (none) to 1: amount of change that means nothing, see `synthetic_distractors`


def check_scene(size: int, frames: int, dwell: str) -> None:
    """Raise ValueError, which names the argument, if no scene can have these parameters."""
    if size < 32 or size % 2:
        raise ValueError(f"size must be an even number of pixels of at least 32, got {size}")
    longest = 2 * WINDOW - len(PHASES) * MIN_DWELL - MIN_SLACK
    if not WINDOW <= frames <= longest:
        raise ValueError(f"frames must be in {WINDOW}..{longest}, got {frames}")
    if dwell not in DWELLS:
        raise ValueError(f"dwell must be one of {DWELLS}, got {dwell!r}")


def render(
    index: int,
    *,
    seed: int = 0,
    split: str = "train",
    size: int = 56,
    frames: int = 36,
    dwell: str = "uneven",
    distractors: bool = False,
) -> tuple[np.ndarray, int, Truth]:
    """Render clip `index` of a split: return RGB frames uint8 [T, H, W, 3], the label and the ground truth.

    The clip depends only on the arguments. With `distractors` most of its change means nothing: their amount is drawn for
    each clip from 0 to 1, and scales the motion of object and background, too (`busyness`).
    """
    check_scene(size, frames, dwell)
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    for name, value in (("index", index), ("seed", seed)):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value!r}")
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    label = index % len(CLASSES)
    timeline = draw_timeline(rng, frames=frames, dwell=dwell)
    busyness = max(0.0, float(rng.uniform(-0.5, 1.0)))  # a third of the clips are static between the events
    amount = 0.0
    if distractors:
        busyness = amount = float(rng.uniform())

    video = _background(rng, size=size, frames=frames, busyness=busyness)
    scenes = np.sort(rng.integers(1, frames, rng.binomial(SCENES, amount))) if distractors else ()
    for first in map(int, scenes):
        video[first:] = _background(rng, size=size, frames=frames - first, busyness=busyness)
    for _ in range(rng.binomial(3, busyness)):
        _draw_distractor(rng, video, busyness=busyness)
    if distractors:
        draw_passing(rng, video, amount=amount)
    _draw_object(rng, video, order=ORDERS[label], timeline=timeline, busyness=busyness)
    if distractors:
        video = film(rng, video, amount=amount)
    video += rng.normal(0.0, NOISE, video.shape).astype(np.float32)  # sensor noise

    pixels = np.rint(video.clip(0, 1) * 255).astype(np.uint8)
    steps = step_changes(pixels)
    return pixels, label, Truth(
        label=label,
        timeline=timeline,
        busyness=busyness,
        change=float(steps.mean()),
        changed_steps=int((steps > VISIBLE).sum()),
        distractors=amount,
    )


def step_changes(pixels: np.ndarray) -> np.ndarray:
    """Compute the mean absolute change between successive frames in grey levels: [T, H, W, 3] -> [T - 1].

    Averages blocks of 4 x 4 pixels first to suppress noise.
    """
    t, h, w, c = pixels.shape
    h, w = h // 4 * 4, w // 4 * 4
    blocks = pixels[:, :h, :w].reshape(t, h // 4, 4, w // 4, 4, c).mean((2, 4), dtype=np.float32)
    return np.abs(np.diff(blocks, axis=0)).mean((1, 2, 3))


def draw_timeline(rng: np.random.Generator, *, frames: int, dwell: str) -> Timeline:
    """Draw onset and dwell times such that each window of a clip's length shows all phases.

    All phases are within the frames that all windows share. The dwell times are exchangeable: if the first or last phase
    were longer on average, counting frames would reveal which phase it is.
    """
    margin = frames - WINDOW
    core = frames - 2 * margin
    least = BRIEF_DWELL if dwell == "brief" else MIN_DWELL
    slack = core - len(PHASES) * least
    absent = int(rng.integers(0, slack // 3 + 1))  # frames of the core that do not show the object
    onset = margin + int(rng.integers(0, absent + 1))
    spare = slack - absent
    if dwell != "even":
        extra = rng.multinomial(spare, rng.dirichlet([CONCENTRATION] * len(PHASES)))
    else:
        extra = rng.permutation([(spare + i) // len(PHASES) for i in range(len(PHASES))])
    bounds = onset + np.concatenate([[0], np.cumsum(least + extra)])
    return Timeline(starts=tuple(int(b) for b in bounds[:-1]), end=int(bounds[-1]))


def _swing(rng: np.random.Generator, frames: int, amplitude: float) -> np.ndarray:
    """Draw a smooth oscillation [T] within +-amplitude; its distribution is symmetric under time reversal."""
    cycles, phase = rng.uniform(0.3, 1.5), rng.uniform(0, 2 * np.pi)
    return (amplitude * np.sin(2 * np.pi * cycles * np.arange(frames) / frames + phase)).astype(np.float32)


def _background(rng: np.random.Generator, *, size: int, frames: int, busyness: float) -> np.ndarray:
    """Render a random coloured texture that drifts in proportion to `busyness`: float32 [T, H, W, 3] in 0..1."""
    ky, kx = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]
    stretch = np.exp(rng.normal(0, 0.6))  # elongated along one axis, so that textures differ
    radius = np.hypot(ky * stretch, kx / stretch)
    radius[0, 0] = np.inf  # no constant term: the mean colour is added below
    falloff = radius ** -rng.uniform(1.0, 2.0)
    noise = rng.normal(size=(2, *radius.shape)) + 1j * rng.normal(size=(2, *radius.shape))
    spectrum = noise * falloff  # [2, H, W/2+1]: two layers of different colours
    # Shift by a phase in the spectrum: exact at subpixels, and the texture wraps around.
    dy, dx = (_swing(rng, frames, 0.2 * size * busyness * rng.uniform(0, 1)) for _ in range(2))
    still = busyness == 0
    if still:
        dy, dx = dy[:1], dx[:1]
    turn = np.exp(-2j * np.pi * (ky * dy[:, None, None] + kx * dx[:, None, None]))  # [T, H, W/2+1]
    layers = np.fft.irfft2(spectrum[:, None] * turn, s=(size, size))  # [2, T, H, W]
    layers = (layers / layers.std((1, 2, 3), keepdims=True)).astype(np.float32)
    tints = rng.uniform(-0.05, 0.05, (2, 3)).astype(np.float32) + rng.uniform(0.03, 0.08)
    colour = rng.uniform(0.35, 0.6) + rng.uniform(-0.06, 0.06, 3)
    # Not a matrix product: the rounding of a BLAS depends on its threads.
    video = sum(layer[..., None] * tint for layer, tint in zip(layers, tints)) + colour.astype(np.float32)
    return np.repeat(video, frames, axis=0) if still else video


def _course(rng: np.random.Generator, *, size: int, frames: int, busyness: float) -> tuple[np.ndarray, ...]:
    """Draw the motion of a shape: centre (y, x), relative scale and angle, each [T]."""
    reach = 0.14 * size * busyness
    y, x = (rng.uniform(0.3, 0.7) * size + _swing(rng, frames, reach * rng.uniform(0.3, 1)) for _ in range(2))
    scale = 1 + _swing(rng, frames, 0.2 * busyness)
    angle = rng.uniform(-0.4, 0.4) + _swing(rng, frames, 1.5 * busyness * rng.uniform(0, 1))
    return y, x, scale, angle


def _draw_distractor(rng: np.random.Generator, video: np.ndarray, *, busyness: float) -> None:
    """Draw a small coloured bar that moves behind the object in part of the clip: change without information."""
    frames, size = video.shape[:2]
    y, x, scale, angle = _course(rng, size=size, frames=frames, busyness=busyness)
    y, x = y + rng.uniform(-0.2, 0.2) * size, x + rng.uniform(-0.2, 0.2) * size
    radius = scale * rng.uniform(0.06, 0.14) * size
    colour = np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0, 0.4), rng.uniform(0.2, 0.9)))
    first, last = np.sort(rng.integers(0, frames + 1, 2))
    during = slice(first, last)
    paint(video[during], cover("bar", y[during], x[during], radius[during], angle[during], size), colour)


def _draw_object(
    rng: np.random.Generator, video: np.ndarray, *, order: tuple[int, ...], timeline: Timeline, busyness: float
) -> None:
    """Draw the object in its four phases."""
    frames, size = video.shape[:2]
    y, x, scale, angle = _course(rng, size=size, frames=frames, busyness=busyness)
    radius = scale * (0.30 - 0.15 * rng.uniform() ** 2) * size  # mostly large, down to half
    # Drawn per phase, not per position in the order, so that the draw does not depend on the class.
    jitter = rng.uniform(-1, 1, (len(PHASES), 3)) * (0.04, 0.15, 0.12) + (0, 0.82, 0.85)
    for phase, start, dwell in zip(order, timeline.starts, timeline.dwells):
        during = slice(start, start + dwell)
        covered = cover(PHASES[phase], y[during], x[during], radius[during], angle[during], size)
        hue, saturation, value = jitter[phase]
        colour = np.array(colorsys.hsv_to_rgb((HUES[phase] + hue) % 1, saturation, value))
        paint(video[during], covered, colour)
