"""Packed execution: clips of different length run together, each as if it were alone.

The kept features of all clips stand one after another in time, [1, C, M = sum B', H, W], with the
lengths beside them in `Segments`. Framewise operations (1x1x1 and spatial convolutions, batch
norm, activations, residual sums) run as they are, so batch statistics see no padding. An operation
that looks along time is replaced by one of the functions below.

In channels-last memory a frame is one contiguous block, so moving frames is a copy of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Callable, NamedTuple, Sequence

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
        centres = _centres(self.lengths, window, self.times.device)
        return Segments(lengths, window.out(self.frames), self.times.index_select(0, centres) / window.stride)

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


def pack(x: Tensor) -> Tensor:
    """Clips that keep all their features, one after another: [N, C, T, H, W] -> [1, C, N T, H, W]."""
    n, c, t, h, w = x.shape
    return x.permute(0, 2, 3, 4, 1).reshape(1, n * t, h, w, c).permute(0, 4, 1, 2, 3)


def take(x: Tensor, places: Tensor) -> Tensor:
    """The frames of x [1, C, M, H, W] at `places` [K]: [1, C, K, H, W], in the same memory format."""
    frames = x.permute(0, 2, 3, 4, 1)  # [1, M, H, W, C]
    if frames.is_contiguous():
        return frames[0].index_select(0, places)[None].permute(0, 4, 1, 2, 3)
    return x.index_select(2, places)


def apart(run: Callable[[Tensor], Tensor], x: Tensor, segments: Segments, window: Window, *, fill: float = 0.0) -> Tensor:
    """`run`, an operation with this window along time, on each clip of x alone: [1, C, M, H, W] -> [1, C', M', ...].

    Clips are parted by gaps of `fill` as wide as the operation's padding, each clip starting at a
    multiple of its stride; clips of one length need no gap, since they are a batch.
    """
    n, length = len(segments.lengths), segments.lengths[0]
    if n == 1:
        return run(x)
    frames = x.permute(0, 2, 3, 4, 1)  # [1, M, H, W, C]
    if frames.is_contiguous() and segments.lengths == (length,) * n:
        return pack(run(frames.view(n, length, *frames.shape[2:]).permute(0, 4, 1, 2, 3)))
    layout = _layout(segments.lengths, window, x.device)
    spaced = take(x, layout.source)
    if layout.gaps is not None:
        spaced = spaced.index_fill(2, layout.gaps, fill) if spaced.requires_grad else spaced.index_fill_(2, layout.gaps, fill)
    return take(run(spaced), layout.kept)


def conv3d(module: nn.Conv3d, x: Tensor, segments: Segments) -> Tensor:
    """A convolution along time in which no clip sees its neighbours: [1, C, M, H, W] -> [1, C', M', ...]."""
    _check(x, segments)
    window = window_of(module)
    if window.kernel == 1 and window.padding == 0:  # a shortcut that skips frames: nothing to part
        x = take(x, _centres(segments.lengths, window, x.device))
        stride = (1, *module.stride[1:])
        return nn.functional.conv3d(x, module.weight, module.bias, stride, module.padding, module.dilation, module.groups)
    return apart(module, x, segments, window)


def max_pool(module: nn.MaxPool3d, x: Tensor, segments: Segments) -> Tensor:
    """A max pool along time, each clip alone."""
    _check(x, segments)
    return apart(module, x, segments, window_of(module), fill=-torch.inf)


def avg_pool(module: nn.AvgPool3d, x: Tensor, segments: Segments) -> Tensor:
    """An average pool along time that counts its zero padding, each clip alone."""
    _check(x, segments)
    return apart(module, x, segments, window_of(module))


def window_of(module: nn.Module) -> Window:
    """The temporal window of a convolution or pool."""
    sizes = [getattr(module, name, 1) for name in ("kernel_size", "stride", "padding", "dilation")]
    return Window(*(size if isinstance(size, int) else size[0] for size in sizes))


def wasted(lengths: Sequence[int], window: Window) -> int:
    """Output positions that `apart` computes beyond those it keeps."""
    if len(set(lengths)) == 1 or (window.kernel == 1 and window.padding == 0):
        return 0
    starts = _starts(lengths, window)
    return window.out(starts[-1] + lengths[-1]) - sum(window.out(length) for length in lengths)


def segment_mean(x: Tensor, segments: Segments) -> Tensor:
    """Each clip's mean over time and space: [1, C, M, H, W] -> [N, C, 1, 1, 1]."""
    _check(x, segments)
    wide = torch.promote_types(x.dtype, torch.float32)
    frames = x.mean(dim=(0, 3, 4), dtype=wide).t()  # [M, C]
    sums = frames.new_zeros(len(segments.lengths), frames.shape[1]).index_add(0, segments.owner, frames)
    return (sums / segments.counts[:, None]).to(x.dtype)[:, :, None, None, None]


def global_pool(module: nn.Module, x: Tensor, segments: Segments) -> Tensor:
    """A head's global average pool: leaves the packed layout for one value a clip."""
    return segment_mean(x, segments)


def mean(x: Tensor, segments: Segments, *, keepdim: bool) -> Tensor:
    """`x.mean(dim=(2, 3, 4))` of each clip: [N, C], or [N, C, 1, 1, 1] with keepdim."""
    means = segment_mean(x, segments)
    return means if keepdim else means.flatten(1)


def spread(values: Tensor, segments: Segments) -> Tensor:
    """One value a clip for each of its features: [N, C, 1, 1, 1] -> [1, C, M, 1, 1]."""
    return values[:, :, 0, 0, 0].index_select(0, segments.owner).t()[None, :, :, None, None]


def squeeze_excitation(module: nn.Module, x: Tensor, segments: Segments) -> Tensor:
    """fvcore's SqueezeExcitation with one excitation a clip."""
    return x * spread(module.block(segment_mean(x, segments)), segments)


def non_local(module: nn.Module, x: Tensor, segments: Segments) -> Tensor:
    """pytorchvideo's NonLocal, in which a position attends to its own clip only."""
    _check(x, segments)
    pooled = x if module.pool is None else module.pool(x)

    def clips(values: Tensor) -> Tensor:  # [1, C, M, H, W] -> [N, longest H W, C]
        rows = values[0].permute(1, 2, 3, 0).flatten(1, 2)  # [M, H W, C]
        return rows.index_select(0, segments.padded.flatten()).reshape(len(segments.lengths), -1, rows.shape[2])

    theta, phi, g = clips(module.conv_theta(x)), clips(module.conv_phi(pooled)), clips(module.conv_g(pooled))
    area = pooled.shape[3] * pooled.shape[4]
    counts = segments.counts
    absent = torch.arange(phi.shape[1], device=x.device) >= counts[:, None] * area  # [N, longest H' W']
    affinity = theta @ phi.transpose(1, 2)
    if module.instantiation == "softmax":
        affinity = (affinity * theta.shape[2] ** -0.5).masked_fill(absent[:, None], -torch.inf).softmax(dim=2)
    else:
        affinity = affinity.masked_fill(absent[:, None], 0) / (counts * area)[:, None, None]
    mixed = (affinity @ g).reshape(-1, *x.shape[3:], g.shape[2]).index_select(0, unpadded(segments.lengths, x.device))  # [M, H, W, C]
    out = module.conv_out(mixed[None].permute(0, 4, 1, 2, 3))
    return x + (out if module.norm is None else module.norm(out))


def _check(x: Tensor, segments: Segments) -> None:
    if x.shape[2] != sum(segments.lengths):
        raise AssertionError(f"packed length {x.shape[2]} is not the sum of {segments.lengths}")


class _Layout(NamedTuple):
    source: Tensor  # [G] the packed frame that each place of the parted sequence holds; gaps hold any
    gaps: Tensor | None  # the places of the gaps
    kept: Tensor  # [M'] the outputs that belong to a clip


def _starts(lengths: Sequence[int], window: Window) -> list[int]:
    starts, end = [], 0
    for length in lengths:
        start = -(-end // window.stride) * window.stride
        starts.append(start)
        end = start + max(length + window.padding, (window.out(length) - 1) * window.stride + 1)
    return starts


# Plans are made on the host from the lengths alone and cached by them, so that the many operations
# of one batch share a few.


@lru_cache(maxsize=1024)
def _layout(lengths: tuple[int, ...], window: Window, device: torch.device) -> _Layout:
    starts = _starts(lengths, window)
    source, filled, kept, first = [0] * (starts[-1] + lengths[-1]), set(), [], 0
    for start, length in zip(starts, lengths):
        source[start : start + length] = range(first, first + length)
        filled.update(range(start, start + length))
        kept += range(start // window.stride, start // window.stride + window.out(length))
        first += length
    gaps = [place for place in range(len(source)) if place not in filled]
    return _Layout(_on(source, device), _on(gaps, device) if gaps else None, _on(kept, device))


@lru_cache(maxsize=1024)
def _centres(lengths: tuple[int, ...], window: Window, device: torch.device) -> Tensor:
    centres, first, shift = [], 0, window.dilation * (window.kernel - 1) // 2 - window.padding
    for length in lengths:
        centres += [first + min(max(i * window.stride + shift, 0), length - 1) for i in range(window.out(length))]
        first += length
    return _on(centres, device)


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
            return torch.tensor(values, device=device)
        return torch.tensor(values).pin_memory().to(device, non_blocking=True)
