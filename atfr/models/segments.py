"""How packed clips follow each other in time: their lengths, and where each feature goes.

Plans of where to move features are made on the host from the lengths alone and cached by them, so
that the many operations of one batch share a few.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Sequence

import torch
from torch import Tensor, nn


class Window(NamedTuple):
    """What an operation sees along time, in features."""

    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    def out(self, length: int) -> int:
        """How many features come out of `length`; below 1 where the input is too short."""
        return (length + 2 * self.padding - self.dilation * (self.kernel - 1) - 1) // self.stride + 1


@dataclass(frozen=True)
class Segments:
    """How the clips of a packed tensor follow each other in time; lengths are explicit, never inferred."""

    lengths: tuple[int, ...]
    frames: int  # T: how many features a clip has here where none is dropped
    times: Tensor  # [M] float32: each feature's time, in dense features

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"every clip must keep at least one feature, not {self.lengths}")

    @staticmethod
    def whole(clips: int, frames: int, device: torch.device) -> Segments:
        """Clips that keep all their features."""
        return Segments((frames,) * clips, frames, torch.arange(frames, device=device, dtype=torch.float32).repeat(clips))

    def through(self, window: Window) -> Segments:
        """Behind an operation with this window; a feature's time is that of its window's centre."""
        lengths = tuple(window.out(length) for length in self.lengths)
        if min(lengths) < 1:
            raise ValueError(f"clips of {self.lengths} features are too short for {window}")
        middle = centres(self.lengths, window, self.times.device)
        return Segments(lengths, window.out(self.frames), self.times.index_select(0, middle) / window.stride)

    @property
    def owner(self) -> Tensor:
        """[M] int64: the clip that each packed position belongs to."""
        return _owner(self.lengths, self.times.device)

    @property
    def padded(self) -> Tensor:
        """[N, longest] int64: the packed position of each clip's features; 0 where it has no more."""
        return _padded(self.lengths, self.times.device)

    @property
    def counts(self) -> Tensor:
        """[N] int64: the lengths, on the device."""
        return _counts(self.lengths, self.times.device)


def window_of(module: nn.Module) -> Window:
    """The temporal window of a convolution or pool."""
    sizes = [getattr(module, name, 1) for name in ("kernel_size", "stride", "padding", "dilation")]
    return Window(*(size if isinstance(size, int) else size[0] for size in sizes))


def pack(x: Tensor) -> Tensor:
    """Clips that keep all their features, one after another: [N, C, T, H, W] -> [1, C, N T, H, W]."""
    n, c, t, h, w = x.shape
    return x.permute(0, 2, 3, 4, 1).reshape(1, n * t, h, w, c).permute(0, 4, 1, 2, 3)


def take(x: Tensor, places: Tensor) -> Tensor:
    """The frames of x [1, C, M, H, W] at `places` [K]: [1, C, K, H, W], in the same memory format."""
    frames = x.permute(0, 2, 3, 4, 1)  # [1, M, H, W, C]
    if frames.is_contiguous():  # as rows, which torch copies six times as fast as blocks of more dimensions
        rows = frames.flatten(2)[0].index_select(0, places)
        return rows.view(1, len(places), *frames.shape[2:]).permute(0, 4, 1, 2, 3)
    return x.index_select(2, places)


class Layout(NamedTuple):
    source: Tensor  # [G] the packed frame that each place of the parted sequence holds; gaps hold any
    gaps: Tensor | None  # the places of the gaps
    kept: Tensor  # [M'] the outputs that belong to a clip


def starts(lengths: Sequence[int], window: Window) -> list[int]:
    """Where each clip begins when gaps as wide as the window's padding part them."""
    begins, end = [], 0
    for length in lengths:
        start = -(-end // window.stride) * window.stride
        begins.append(start)
        end = start + max(length + window.padding, (window.out(length) - 1) * window.stride + 1)
    return begins


@lru_cache(maxsize=1024)
def layout(lengths: tuple[int, ...], window: Window, device: torch.device) -> Layout:
    """The parted sequence of `starts`."""
    begins = starts(lengths, window)
    source, filled, kept, first = [0] * (begins[-1] + lengths[-1]), set(), [], 0
    for start, length in zip(begins, lengths):
        source[start : start + length] = range(first, first + length)
        filled.update(range(start, start + length))
        kept += range(start // window.stride, start // window.stride + window.out(length))
        first += length
    gaps = [place for place in range(len(source)) if place not in filled]
    return Layout(_on(source, device), _on(gaps, device) if gaps else None, _on(kept, device))


@lru_cache(maxsize=1024)
def centres(lengths: tuple[int, ...], window: Window, device: torch.device) -> Tensor:
    """[M'] the packed feature at the centre of each output's window."""
    middle, first, shift = [], 0, window.dilation * (window.kernel - 1) // 2 - window.padding
    for length in lengths:
        middle += [first + min(max(i * window.stride + shift, 0), length - 1) for i in range(window.out(length))]
        first += length
    return _on(middle, device)


@lru_cache(maxsize=256)
def neighbours(lengths: tuple[int, ...], shift: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The features that have another one of their clip `shift` after them, and that other one."""
    into, first = [], 0
    for length in lengths:
        into += [first + i for i in range(length) if 0 <= i + shift < length]
        first += length
    return _on(into, device), _on([place + shift for place in into], device)


@lru_cache(maxsize=256)
def boundaries(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The last feature of each clip but the last and the one before it; the first of each but the first
    and the one after it; -1 where the clip has no such neighbour."""
    ends = list(itertools.accumulate(lengths))
    lasts = [end - 1 for end in ends[:-1]]
    before = [end - 2 if length > 1 else -1 for end, length in zip(ends, lengths[:-1])]
    firsts = ends[:-1]
    after = [first + 1 if length > 1 else -1 for first, length in zip(firsts, lengths[1:])]
    return tuple(_on(places, device) for places in (lasts, before, firsts, after))


@lru_cache(maxsize=256)
def _owner(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return _on([clip for clip, length in enumerate(lengths) for _ in range(length)], device)


@lru_cache(maxsize=256)
def _padded(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    rows, first = [], 0
    for length in lengths:
        rows.append([*range(first, first + length), *[0] * (max(lengths) - length)])
        first += length
    return _on(rows, device)


@lru_cache(maxsize=256)
def unpadded(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """[M] int64: where each packed position lies in [N, longest], flattened."""
    return _on([clip * max(lengths) + i for clip, length in enumerate(lengths) for i in range(length)], device)


@lru_cache(maxsize=256)
def _counts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return _on(lengths, device)


def _on(values: Sequence, device: torch.device) -> Tensor:
    """Integers on the device, without making the host wait for it."""
    with torch.inference_mode(False):  # a tensor made in inference mode could not serve a training step later
        if device.type != "cuda":
            return torch.tensor(values, dtype=torch.int64, device=device)  # of no values, too
        return torch.tensor(values, dtype=torch.int64).pin_memory().to(device, non_blocking=True)
