"""The shapes that the scenes of the built-in dataset are drawn with. Lengths are in pixels and colours in 0..1."""

from __future__ import annotations

import numpy as np


def cover(shape: str, y: np.ndarray, x: np.ndarray, scale: np.ndarray, angle: np.ndarray, size: int) -> np.ndarray:
    """Compute the part of each pixel that a shape covers, [T, H, W] in 0..1; `scale` is its radius in pixels."""
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


def paint(video: np.ndarray, covered: np.ndarray, colour: np.ndarray) -> None:
    """Blend `colour` [3] into `video` [T, H, W, 3], in place, with opacity `covered` [T, H, W]."""
    video += covered[..., None].astype(np.float32) * (colour.astype(np.float32) - video)
