"""The scenes of the built-in dataset: one object that goes through four phases in an order.

A clip shows a textured background. At the onset an object appears; it is a disc, a square, a cross and
a ring in some order, each exactly once, and then it is gone. The class is that order. What the eight
orders have in common is what makes a temporal model necessary:

- every class holds the same phases, and how long a phase lasts does not depend on the class, so a clip
  whose frames were shuffled says nothing about it;
- each phase comes first, second, third and last in equally many classes, so one frame says little
  even to a model that knows the frame's time;
- the classes are closed under reversal and so is everything that moves. Even a model that puts shuffled
  frames back in line by following the motion is left with two classes for one clip.

Time is in frames, lengths are in pixels and colours in 0..1 unless a name says otherwise.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np

PHASES: tuple[str, ...] = ("disc", "square", "cross", "ring")
HUES: tuple[float, ...] = (0.0, 0.33, 0.62, 0.15)  # one a phase, as colorsys counts them (0..1)

# Disc and square are the ends and cross and ring the middle, or the reverse; each pair in both orders.
# A class's label is its place here; the names are in alphabetical order, as lists of names are read.
ORDERS: tuple[tuple[int, ...], ...] = (
    (2, 0, 1, 3), (2, 1, 0, 3), (0, 2, 3, 1), (0, 3, 2, 1),
    (3, 0, 1, 2), (3, 1, 0, 2), (1, 2, 3, 0), (1, 3, 2, 0),
)  # fmt: skip
CLASSES: tuple[str, ...] = tuple("-".join(PHASES[phase] for phase in order) for order in ORDERS)
assert list(CLASSES) == sorted(CLASSES)

WINDOW = 31  # video frames spanned by a clip of 16 frames at stride 2
MIN_DWELL = 3  # video frames: at stride 2 a phase gives one or two frames of the clip at least
BRIEF_DWELL = 2  # the same of dwell="brief": at stride 2 exactly one frame of the clip at least
MIN_SLACK = 6  # video frames to share out unevenly; fewer and the dwell times are all alike
DWELLS: tuple[str, ...] = ("uneven", "even", "brief")
SPLITS: tuple[str, ...] = ("train", "test")

CONCENTRATION = 0.3  # of the Dirichlet that shares out the slack: small means one phase takes most
NOISE = 0.006  # standard deviation of the sensor noise, of the range of a pixel
VISIBLE = 0.55  # mean absolute change (grey levels of 255) from which a step counts as a change


@dataclass(frozen=True)
class Timeline:
    """When the phases begin (video frames); the object is visible from `starts[0]` to before `end`."""

    starts: tuple[int, ...]
    end: int

    @property
    def dwells(self) -> tuple[int, ...]:
        """Length of each phase in frames, in the order in which they come."""
        bounds = (*self.starts, self.end)
        return tuple(after - before for before, after in zip(bounds, bounds[1:]))


@dataclass(frozen=True)
class Truth:
    """What is known about a clip because it was made."""

    label: int
    timeline: Timeline
    busyness: float  # 0 (still between the events) .. 1: scales all motion and the clutter
    change: float  # mean absolute change a step, in grey levels of 255
    changed_steps: int  # steps from one frame to the next with a visible change


def check_scene(size: int, frames: int, dwell: str) -> None:
    """Raise a ValueError naming the first argument that no scene can be made from."""
    if size < 32 or size % 2:
        raise ValueError(f"size must be an even number of pixels of at least 32, got {size}")
    longest = 2 * WINDOW - len(PHASES) * MIN_DWELL - MIN_SLACK
    if not WINDOW <= frames <= longest:
        raise ValueError(f"frames must be in {WINDOW}..{longest}, got {frames}")
    if dwell not in DWELLS:
        raise ValueError(f"dwell must be one of {DWELLS}, got {dwell!r}")


def render(
    index: int, *, seed: int = 0, split: str = "train", size: int = 56, frames: int = 36, dwell: str = "uneven"
) -> tuple[np.ndarray, int, Truth]:
    """Draw clip `index` of a split: uint8 frames [T, H, W, 3] (RGB), its label and what is true of it.

    The clip depends on the arguments alone, never on other clips or on which process draws it.
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
    busyness = max(0.0, float(rng.uniform(-0.5, 1.0)))  # a third of the clips are still between the events

    video = _background(rng, size=size, frames=frames, busyness=busyness)
    for _ in range(rng.binomial(3, busyness)):
        _draw_distractor(rng, video, busyness=busyness)
    _draw_object(rng, video, order=ORDERS[label], timeline=timeline, busyness=busyness)
    video += rng.normal(0.0, NOISE, video.shape).astype(np.float32)  # sensor noise

    pixels = np.rint(video.clip(0, 1) * 255).astype(np.uint8)
    steps = step_changes(pixels)
    return pixels, label, Truth(
        label=label,
        timeline=timeline,
        busyness=busyness,
        change=float(steps.mean()),
        changed_steps=int((steps > VISIBLE).sum()),
    )


def step_changes(pixels: np.ndarray) -> np.ndarray:
    """Mean absolute change from each frame to the next, in grey levels: [T, H, W, 3] -> [T - 1].

    Averaged over blocks of 4 x 4 pixels first, so that noise is not taken for change.
    """
    t, h, w, c = pixels.shape
    h, w = h // 4 * 4, w // 4 * 4
    blocks = pixels[:, :h, :w].reshape(t, h // 4, 4, w // 4, 4, c).mean((2, 4), dtype=np.float32)
    return np.abs(np.diff(blocks, axis=0)).mean((1, 2, 3))


def draw_timeline(rng: np.random.Generator, *, frames: int, dwell: str) -> Timeline:
    """Choose onset and dwell times so that every window of a clip's length shows all phases.

    All phases lie in the frames that every window shares. The dwell times are exchangeable: were the
    first or the last phase longer on average, a count of frames would tell which phase it was.
    """
    margin = frames - WINDOW
    core = frames - 2 * margin
    least = BRIEF_DWELL if dwell == "brief" else MIN_DWELL
    slack = core - len(PHASES) * least
    absent = int(rng.integers(0, slack // 3 + 1))  # frames of the core without the object
    onset = margin + int(rng.integers(0, absent + 1))
    spare = slack - absent
    if dwell != "even":
        extra = rng.multinomial(spare, rng.dirichlet([CONCENTRATION] * len(PHASES)))
    else:
        extra = rng.permutation([(spare + i) // len(PHASES) for i in range(len(PHASES))])
    bounds = onset + np.concatenate([[0], np.cumsum(least + extra)])
    return Timeline(starts=tuple(int(b) for b in bounds[:-1]), end=int(bounds[-1]))


def _swing(rng: np.random.Generator, frames: int, amplitude: float) -> np.ndarray:
    """A smooth back-and-forth course over the clip, [T], within +-amplitude; reversible in law."""
    cycles, phase = rng.uniform(0.3, 1.5), rng.uniform(0, 2 * np.pi)
    return (amplitude * np.sin(2 * np.pi * cycles * np.arange(frames) / frames + phase)).astype(np.float32)


def _background(rng: np.random.Generator, *, size: int, frames: int, busyness: float) -> np.ndarray:
    """A random coloured texture that drifts as far as the clip is busy: float32 [T, H, W, 3] in 0..1."""
    ky, kx = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]
    stretch = np.exp(rng.normal(0, 0.6))  # elongated along one axis, so that textures differ in kind
    radius = np.hypot(ky * stretch, kx / stretch)
    radius[0, 0] = np.inf  # no constant term: the mean colour is chosen below
    falloff = radius ** -rng.uniform(1.0, 2.0)
    noise = rng.normal(size=(2, *radius.shape)) + 1j * rng.normal(size=(2, *radius.shape))
    spectrum = noise * falloff  # [2, H, W/2+1]: two layers, each with a colour of its own
    # A shift is a phase in the spectrum: exact below a pixel, and the texture wraps around.
    dy, dx = (_swing(rng, frames, 0.2 * size * busyness * rng.uniform(0, 1)) for _ in range(2))
    still = busyness == 0
    if still:
        dy, dx = dy[:1], dx[:1]
    turn = np.exp(-2j * np.pi * (ky * dy[:, None, None] + kx * dx[:, None, None]))  # [T, H, W/2+1]
    layers = np.fft.irfft2(spectrum[:, None] * turn, s=(size, size))  # [2, T, H, W]
    layers = (layers / layers.std((1, 2, 3), keepdims=True)).astype(np.float32)
    tints = rng.uniform(-0.05, 0.05, (2, 3)).astype(np.float32) + rng.uniform(0.03, 0.08)
    colour = rng.uniform(0.35, 0.6) + rng.uniform(-0.06, 0.06, 3)
    # Written out, not a matrix product: a BLAS may use other threads, and round otherwise.
    video = sum(layer[..., None] * tint for layer, tint in zip(layers, tints)) + colour.astype(np.float32)
    return np.repeat(video, frames, axis=0) if still else video


def _course(rng: np.random.Generator, *, size: int, frames: int, busyness: float) -> tuple[np.ndarray, ...]:
    """Centre (y, x), relative scale and angle of something that moves, each [T]."""
    reach = 0.14 * size * busyness
    y, x = (rng.uniform(0.3, 0.7) * size + _swing(rng, frames, reach * rng.uniform(0.3, 1)) for _ in range(2))
    scale = 1 + _swing(rng, frames, 0.2 * busyness)
    angle = rng.uniform(-0.4, 0.4) + _swing(rng, frames, 1.5 * busyness * rng.uniform(0, 1))
    return y, x, scale, angle


def _cover(shape: str, y: np.ndarray, x: np.ndarray, scale: np.ndarray, angle: np.ndarray, size: int) -> np.ndarray:
    """How much of each pixel a shape covers, [T, H, W] in 0..1; `scale` is its radius in pixels."""
    axis = np.arange(size, dtype=np.float32) + 0.5
    dy = axis[None, :, None] - y[:, None, None]
    dx = axis[None, None, :] - x[:, None, None]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    u, v = np.abs(cos * dx + sin * dy), np.abs(cos * dy - sin * dx)  # all shapes are symmetric
    r = scale[:, None, None]
    if shape == "disc":
        distance = np.hypot(u, v) - r
    elif shape == "square":
        distance = np.maximum(u, v) - 0.85 * r
    elif shape == "cross":
        distance = np.minimum(np.maximum(u - r, v - 0.32 * r), np.maximum(v - r, u - 0.32 * r))
    elif shape == "ring":
        distance = np.abs(np.hypot(u, v) - 0.75 * r) - 0.27 * r
    else:
        assert shape == "bar", shape
        distance = np.maximum(u - r, v - 0.3 * r)
    return np.clip(0.5 - distance, 0, 1)  # one pixel of antialiasing


def _paint(video: np.ndarray, cover: np.ndarray, colour: np.ndarray) -> None:
    """Lay a colour over the frames in place: [T, H, W, 3], [T, H, W], [3]."""
    video += cover[..., None].astype(np.float32) * (colour.astype(np.float32) - video)


def _draw_distractor(rng: np.random.Generator, video: np.ndarray, *, busyness: float) -> None:
    """A small coloured bar that roams behind the object for a part of the clip: change that means nothing."""
    frames, size = video.shape[:2]
    y, x, scale, angle = _course(rng, size=size, frames=frames, busyness=busyness)
    y, x = y + rng.uniform(-0.2, 0.2) * size, x + rng.uniform(-0.2, 0.2) * size
    radius = scale * rng.uniform(0.06, 0.14) * size
    colour = np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0, 0.4), rng.uniform(0.2, 0.9)))
    first, last = np.sort(rng.integers(0, frames + 1, 2))
    during = slice(first, last)
    _paint(video[during], _cover("bar", y[during], x[during], radius[during], angle[during], size), colour)


def _draw_object(
    rng: np.random.Generator, video: np.ndarray, *, order: tuple[int, ...], timeline: Timeline, busyness: float
) -> None:
    """The object in its four phases."""
    frames, size = video.shape[:2]
    y, x, scale, angle = _course(rng, size=size, frames=frames, busyness=busyness)
    radius = scale * (0.30 - 0.15 * rng.uniform() ** 2) * size  # mostly large, down to half
    # Drawn a phase, not a position in the order: the draw must not depend on the class.
    jitter = rng.uniform(-1, 1, (len(PHASES), 3)) * (0.04, 0.15, 0.12) + (0, 0.82, 0.85)
    for phase, start, dwell in zip(order, timeline.starts, timeline.dwells):
        during = slice(start, start + dwell)
        cover = _cover(PHASES[phase], y[during], x[during], radius[during], angle[during], size)
        hue, saturation, value = jitter[phase]
        colour = np.array(colorsys.hsv_to_rgb((HUES[phase] + hue) % 1, saturation, value))
        _paint(video[during], cover, colour)
