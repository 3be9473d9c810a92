"""The layout of packed clips in time: their lengths, and the slot of each feature.

Index tensors are computed on the host from the lengths and cached by them, so that the operations of a batch share them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Sequence

import torch
from torch import Tensor, nn


class Window(NamedTuple):
    """The window of an operation over time, in features."""

    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    shift: int = 0  # of the window's centre, where the padding is not the same on both sides

    def out(self, length: int) -> int:
        """Return the number of outputs for `length` inputs; below 1 where the input is too short."""
        return (length + 2 * self.padding - self.dilation * (self.kernel - 1) - 1) // self.stride + 1


@dataclass(frozen=True)
class Segments:
    """The clips of a packed tensor in the order in which they are concatenated; lengths are explicit, never inferred."""

    lengths: tuple[int, ...]
    frames: int  # T: the number of features of a clip that keeps all
    sampled: Tensor  # float32: the time of each feature where they were sampled, in dense features
    gap: int = 0  # number of filler frames between clips (`shared_gap`), contents undefined
    path: tuple[tuple[tuple[int, ...], Window], ...] = ()  # the windows since, each with the lengths in front of it

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"every clip must keep at least one feature, not {self.lengths}")

    @staticmethod
    def whole(clips: int, frames: int, device: torch.device) -> Segments:
        """Return the segments of clips that keep all features."""
        return Segments((frames,) * clips, frames, torch.arange(frames, device=device, dtype=torch.float32).repeat(clips))

    def after(self, window: Window) -> Segments:
        """Return the segments after an operation with this window; an output's time is that of its window's centre."""
        lengths = tuple(window.out(length) for length in self.lengths)
        if min(lengths) < 1:
            raise ValueError(f"clips of {self.lengths} features are too short for {window}")
        return Segments(lengths, window.out(self.frames), self.sampled, path=(*self.path, (self.lengths, window)))

    @property
    def device(self) -> torch.device:
        """The device of the features."""
        return self.sampled.device

    @property
    def times(self) -> Tensor:
        """[sum B'] float32: each feature's time, in dense features; computed here, since few networks need it."""
        times = self.sampled
        for lengths, window in self.path:
            times = times.index_select(0, centres(lengths, window, self.device).slots) / window.stride
        return times

    @property
    def layout(self) -> Layout | None:
        """The slots of the features if there are gaps between clips, else None."""
        return layout(self.lengths, Window(2 * self.gap + 1, padding=self.gap), self.device) if self.gap else None

    @property
    def num_slots(self) -> int:
        """M: the packed tensor's size in time."""
        return sum(self.lengths) if self.layout is None else len(self.layout.source)

    @property
    def owner(self) -> Tensor:
        """[sum B'] int64: the clip that each feature belongs to."""
        return _owner(self.lengths, self.device)

    @property
    def starts(self) -> Tensor:
        """[N + 1] int64: the index of each clip's first feature, then sum B'."""
        return _starts(self.lengths, self.device)

    @property
    def padded(self) -> Tensor:
        """[N, longest] int64: the indices of each clip's features, then 0."""
        return _padded(self.lengths, self.device)

    @property
    def bounds(self) -> Tensor:
        """[sum B', 2] int32: the first feature of each feature's clip, and the end of that clip."""
        return _bounds(self.lengths, self.device)

    @property
    def counts(self) -> Tensor:
        """[N] int64: the lengths, on the device."""
        return _counts(self.lengths, self.device)


def window_of(module: nn.Module) -> Window:
    """Return the window over time of a convolution or pool. Of padding="same" the kernel must be odd."""
    kernel, stride, padding, dilation = (getattr(module, name, 1) for name in ("kernel_size", "stride", "padding", "dilation"))
    kernel, stride, dilation = (size if isinstance(size, int) else size[0] for size in (kernel, stride, dilation))
    if isinstance(padding, str):
        padding = dilation * (kernel - 1) // 2 if padding == "same" else 0
    return Window(kernel, stride, padding if isinstance(padding, int) else padding[0], dilation)


def padded_window(front: int, behind: int) -> Window:
    """Return the window of a padding by so many features: clips of n features become n + front + behind."""
    added = front + behind
    return Window(added + 1, padding=added, shift=added - added // 2 - front)


def pack(x: Tensor) -> Tensor:
    """Concatenate clips in time: [N, C, T, H, W] -> [1, C, N T, H, W]."""
    n, c, t, h, w = x.shape
    return x.permute(0, 2, 3, 4, 1).reshape(1, n * t, h, w, c).permute(0, 4, 1, 2, 3)


def take(x: Tensor, slots: Tensor) -> Tensor:
    """Select the frames of x [1, C, M, H, W] at `slots` [K]: [1, C, K, H, W], in the same memory format."""
    frames = x.permute(0, 2, 3, 4, 1)  # [1, M, H, W, C]
    if frames.is_contiguous():  # as rows, which torch copies six times as fast as blocks of more dimensions
        rows = frames.flatten(2)[0].index_select(0, slots)
        return rows.unflatten(1, frames.shape[2:])[None].permute(0, 4, 1, 2, 3)
    return x.index_select(2, slots)


class Selection(NamedTuple):
    """The frames that are taken, and the way back, by which gradients go."""

    slots: Tensor  # [K] the frame in each place; -1: filler
    inverse: Tensor  # [M] the place of each frame; -1 for one that is not taken


class Layout(NamedTuple):
    """Clips in rows of one length, with gaps between the clips of a row: a batch for an operation over time."""

    rows: int
    source: Tensor  # [K] the feature in each slot, row after row; any feature in a gap
    gaps: Tensor  # the slots of the gaps
    kept: Tensor  # [M'] the slots of the operation's outputs that belong to a clip, in the clips' order
    into: Selection  # features -> slots
    out: Selection  # the operation's outputs -> those that belong to a clip


@lru_cache(maxsize=1024)
def layout(lengths: tuple[int, ...], window: Window, device: torch.device) -> Layout:
    """Lay out the rows of `rows_of` for an operation with this window.

    GPUs get more than one row: cuDNN is slow on a clip that is much longer than those of a batch.
    """
    row_length, rows = rows_of(lengths, window, device.type != "cpu")
    firsts = [0, *itertools.accumulate(lengths)]
    slots, kept = [-1] * (len(rows) * row_length), [range(0)] * len(lengths)
    for row, clips in enumerate(rows):
        for clip, start in clips:
            begin = row * row_length + start
            slots[begin : begin + lengths[clip]] = range(firsts[clip], firsts[clip + 1])
            first = row * window.out(row_length) + start // window.stride
            kept[clip] = range(first, first + window.out(lengths[clip]))
    outputs = [slot for clip in kept for slot in clip]
    return _layout(len(rows), slots, outputs, frames=firsts[-1], num_outputs=len(rows) * window.out(row_length), device=device)


@lru_cache(maxsize=1024)
def padding(lengths: tuple[int, ...], front: int, behind: int, device: torch.device) -> Layout:
    """Lay out clips one after another, each with so many gaps in front of it and behind it."""
    slots: list[int] = []
    for first, end in itertools.pairwise([0, *itertools.accumulate(lengths)]):
        slots += [*[-1] * front, *range(first, end), *[-1] * behind]
    return _layout(1, slots, range(len(slots)), frames=sum(lengths), num_outputs=len(slots), device=device)


def _layout(rows: int, slots: Sequence[int], outputs: Sequence[int], *, frames: int, num_outputs: int, device: torch.device) -> Layout:
    """Copy all indices of a layout to the device at once: `slots` are the features in each slot, -1 in a gap."""
    features, empty = [max(slot, 0) for slot in slots], [place for place, slot in enumerate(slots) if slot < 0]
    found = (features, empty, outputs, slots, _inverse(slots, frames), _inverse(outputs, num_outputs))
    source, gaps, kept, into, places, back = _on([i for indices in found for i in indices], device).split([len(indices) for indices in found])
    return Layout(rows, source, gaps, kept, Selection(into, places), Selection(kept, back))


def _inverse(slots: Sequence[int], frames: int) -> list[int]:
    places = [-1] * frames
    for place, slot in enumerate(slots):
        if slot >= 0:
            places[slot] = place
    return places


@lru_cache(maxsize=1024)
def rows_of(lengths: tuple[int, ...], window: Window, several: bool = False) -> tuple[int, list[list[tuple[int, int]]]]:
    """Return the length of the rows, and the (clip, start) pairs of each row.

    A gap as wide as the window's padding follows each clip of a row but the last, which the operation itself pads, and each
    clip starts at a multiple of the stride. Clips are packed longest first into the fullest row that holds them (best-fit
    decreasing). Candidates for the row length hold the longest clip alone, with one other, or all clips; the one with the
    fewest slots is chosen.

    Args:
        several: more than one row, where there is more than one clip.
    """
    blocks = [-(-max(n + window.padding, (window.out(n) - 1) * window.stride + 1) // window.stride) * window.stride for n in lengths]
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    longest = order[0]
    candidates = {lengths[longest], *(blocks[longest] + length for length in set(lengths)), sum(blocks[i] for i in order[:-1]) + lengths[order[-1]]}
    packed: list[tuple[int, list[list[tuple[int, int]]]]] = []
    for row_length in candidates:
        rows: list[list[tuple[int, int]]] = []
        used: list[int] = []
        for clip in order:
            fitting = [row for row, end in enumerate(used) if end + lengths[clip] <= row_length]
            if fitting:
                row = max(fitting, key=used.__getitem__)
            else:
                row = len(rows)
                rows.append([])
                used.append(0)
            rows[row].append((clip, used[row]))
            used[row] += blocks[clip]
        packed.append((row_length, rows))
    if several and len(lengths) > 1:
        packed = [found for found in packed if len(found[1]) > 1]  # those of the longest clip's length, at least
    return min(packed, key=lambda found: (found[0] * len(found[1]), found[0]))  # of equals the one with the most rows, for more threads


def shared_gap(lengths: tuple[int, ...], gap: int, device: torch.device) -> int:
    """Return the gap that the sampling leaves between clips for all operations over time behind it; 0: none.

    Every operation computes the slots of the gaps; without them each convolution over time moves the features of all clips
    twice. For X3D on CPUs (`benchmarks/where_time_goes.py`) gaps are cheaper while they are less than a quarter of the
    features. Clips of one length need none.
    """
    if not gap or device.type != "cpu" or len(set(lengths)) == 1:
        return 0
    row_length, rows = rows_of(lengths, Window(2 * gap + 1, padding=gap))
    return gap if 4 * (row_length * len(rows) - sum(lengths)) <= sum(lengths) else 0


@lru_cache(maxsize=1024)
def centres(lengths: tuple[int, ...], window: Window, device: torch.device) -> Selection:
    """Select the packed feature at the centre of each output's window, [M']; `inverse` holds where none is selected twice."""
    middle, first, shift = [], 0, window.dilation * (window.kernel - 1) // 2 - window.padding + window.shift
    for length in lengths:
        middle += [first + min(max(i * window.stride + shift, 0), length - 1) for i in range(window.out(length))]
        first += length
    return Selection(*_on([*middle, *_inverse(middle, first)], device).split([len(middle), first]))


@lru_cache(maxsize=256)
def _owner(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return _on([clip for clip, length in enumerate(lengths) for _ in range(length)], device)


@lru_cache(maxsize=256)
def _starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return _on([0, *itertools.accumulate(lengths)], device)


@lru_cache(maxsize=256)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    ends = itertools.accumulate(lengths)
    return _on([(end - length, end) for end, length in zip(ends, lengths) for _ in range(length)], device, torch.int32)


@lru_cache(maxsize=256)
def _padded(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    rows, first = [], 0
    for length in lengths:
        rows.append([*range(first, first + length), *[0] * (max(lengths) - length)])
        first += length
    return _on(rows, device)


@lru_cache(maxsize=256)
def unpadded(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the index of each packed feature in [N, longest], flattened: [M] int64."""
    return _on([clip * max(lengths) + i for clip, length in enumerate(lengths) for i in range(length)], device)


@lru_cache(maxsize=256)
def _counts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return _on(lengths, device)


def _on(values: Sequence, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Copy integers to the device without making the host wait for it."""
    with torch.inference_mode(False):  # the cache serves training steps, too
        if device.type != "cuda":
            return torch.tensor(values, dtype=dtype, device=device)  # of no values, too
        return torch.tensor(values, dtype=dtype).pin_memory().to(device, non_blocking=True)
