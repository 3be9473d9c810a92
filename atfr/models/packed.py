"""Packed execution: clips of different length run together, each as if it were alone.

The kept features of all clips stand one after another in time, [1, C, M = sum B', H, W], with the
lengths beside them in `Segments`. Framewise operations (1x1x1 and spatial convolutions, batch
norm, activations, residual sums) run as they are, so batch statistics see no padding. An operation
that looks along time is replaced by one of the functions below.

In channels-last memory a frame is one contiguous block, so moving frames is a copy of blocks.
"""

from __future__ import annotations

import functools
import itertools
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
    if frames.is_contiguous():  # as rows, which torch copies six times as fast as blocks of more dimensions
        rows = frames.flatten(2)[0].index_select(0, places)
        return rows.view(1, len(places), *frames.shape[2:]).permute(0, 4, 1, 2, 3)
    return x.index_select(2, places)


def apart(run: Callable[[Tensor], Tensor], x: Tensor, segments: Segments, window: Window, *, fill: float = 0.0) -> Tensor:
    """`run`, an operation with this window along time, on each clip of x alone: [1, C, M, H, W] -> [1, C', M', ...].

    Clips are parted by gaps of `fill` as wide as the operation's padding, each clip starting at a
    multiple of its stride.
    """
    layout = _layout(segments.lengths, window, x.device)
    spaced = take(x, layout.source)
    if layout.gaps is not None:
        spaced = spaced.index_fill(2, layout.gaps, fill) if spaced.requires_grad else spaced.index_fill_(2, layout.gaps, fill)
    return take(run(spaced), layout.kept)


def as_batch(run: Callable[[Tensor], Tensor], x: Tensor, segments: Segments) -> Tensor | None:
    """The same for clips of one length, which need no gaps: in channels-last memory they are a batch as they are.

    None where that is not so.
    """
    n, length = len(segments.lengths), segments.lengths[0]
    if n == 1:
        return run(x)
    frames = x.permute(0, 2, 3, 4, 1)  # [1, M, H, W, C]
    if segments.lengths != (length,) * n or not frames.is_contiguous():
        return None
    return pack(run(frames.view(n, length, *frames.shape[2:]).permute(0, 4, 1, 2, 3)))


def conv3d(module: nn.Conv3d, x: Tensor, segments: Segments) -> Tensor:
    """A convolution along time in which no clip sees its neighbours: [1, C, M, H, W] -> [1, C', M', ...]."""
    _check(x, segments)
    way, window = way_of(module, segments.lengths, x.device), window_of(module)
    if way == "pick":
        x = take(x, _centres(segments.lengths, window, x.device))
        stride = (1, *module.stride[1:])
        return nn.functional.conv3d(x, module.weight, module.bias, stride, module.padding, module.dilation, module.groups)
    image = x.device.type == "cpu" and _over_time_alone(module)
    run = (lambda y: _as_image(module, y)) if image else module
    out = as_batch(run, x, segments) if way == "batch" else None
    if out is None:
        out = {"taps": _by_taps, "mend": _mended}[way](module, x, segments) if way in ("taps", "mend") else apart(run, x, segments, window)
    return out


def way_of(module: nn.Conv3d, lengths: Sequence[int], device: torch.device) -> str:
    """How `conv3d` runs clips of these lengths, by what costs least.

    - pick: a kernel of one feature that skips features: nothing to part.
    - batch: clips of one length are a batch.
    - taps: on CPUs, a dense kernel over time alone is a matrix product for each of its taps.
    - mend: a kernel of three features runs over the boundaries between clips as if there were none,
      and the two outputs at each boundary are computed again.
    - gaps: clips are parted by zeros.
    """
    window = window_of(module)
    if window.kernel == 1 and window.padding == 0:
        return "pick"
    if len(set(lengths)) == 1:
        return "batch"
    if window.stride == 1 and 2 * window.padding == window.dilation * (window.kernel - 1):
        if device.type == "cpu" and _over_time_alone(module) and module.groups == 1 and window.kernel % 2 == 1:
            return "taps"
        if window.kernel == 3 and window.dilation == 1:
            return "mend"
    return "gaps"


def wasted(module: nn.Conv3d, lengths: Sequence[int], device: torch.device) -> float:
    """Output positions that `conv3d` computes beyond those of its clips."""
    way, window = way_of(module, lengths, device), window_of(module)
    if way == "mend":
        return 2 * 2 / 3 * (len(lengths) - 1)  # two outputs a boundary, of two taps each
    if way != "gaps":
        return 0
    starts = _starts(lengths, window)
    return window.out(starts[-1] + lengths[-1]) - sum(window.out(length) for length in lengths)


def _over_time_alone(module: nn.Conv3d) -> bool:
    return module.kernel_size[1:] == (1, 1) and module.stride[1:] == (1, 1) and module.padding[1:] == (0, 0)


def _as_image(module: nn.Conv3d, x: Tensor) -> Tensor:
    """A convolution over time alone, as one over images of T x (H W) pixels, for which CPUs are faster."""
    n, _, _, h, w = x.shape
    weight = module.weight[..., 0]  # [C', C, k, 1]
    padding, stride, dilation = (module.padding[0], 0), (module.stride[0], 1), (module.dilation[0], 1)
    image = x.permute(0, 2, 3, 4, 1).flatten(2, 3).permute(0, 3, 1, 2)  # [N, C, T, H W]
    out = nn.functional.conv2d(image, weight, module.bias, stride, padding, dilation, module.groups)
    return out.unflatten(3, (h, w))


def _by_taps(module: nn.Conv3d, x: Tensor, segments: Segments) -> Tensor:
    """A sum over the kernel's taps, each a matrix product added where clip and time allow."""
    _, _, m, h, w = x.shape
    rows = x.permute(0, 2, 3, 4, 1).flatten(1, 3)[0]  # [M H W, C]
    taps = module.weight[..., 0, 0].unbind(2)  # k of [C', C]
    middle = len(taps) // 2
    out = nn.functional.linear(rows, taps[middle], module.bias).view(m, -1)  # [M, H W C']
    for i, tap in enumerate(taps):
        if i != middle:
            into, source = _neighbours(segments.lengths, (i - middle) * module.dilation[0], x.device)
            product = nn.functional.linear(rows, tap).view(m, -1)
            out = out.index_add(0, into, product.index_select(0, source).to(out.dtype))
    return out.view(1, m, h, w, -1).permute(0, 4, 1, 2, 3)


def _mended(module: nn.Conv3d, x: Tensor, segments: Segments) -> Tensor:
    """Run over the boundaries, and write what belongs to the first and last feature of each clip over it."""
    lasts, before, firsts, after = _boundaries(segments.lengths, x.device)
    out = module(x)
    conv = functools.partial(
        nn.functional.conv3d, bias=module.bias, stride=module.stride, padding=(0, *module.padding[1:]), dilation=module.dilation, groups=module.groups
    )
    # Two features each, as a batch: a last one with the one before it, a first one with the one after.
    single = 1 in segments.lengths
    x_last, x_first = _pairs(x, before, lasts, 0, lacking=single), _pairs(x, firsts, after, 1, lacking=single)
    frames = out.permute(0, 2, 3, 4, 1).contiguous()  # [1, M, H, W, C'], a copy only if not channels-last
    rows = frames.flatten(2)[0]
    for places, pairs, taps in ((lasts, x_last, module.weight[:, :, :2]), (firsts, x_first, module.weight[:, :, 1:])):
        mended = conv(pairs, taps).permute(0, 2, 3, 4, 1).reshape(len(places), -1)
        rows.index_copy_(0, places, mended.to(rows.dtype))
    return frames.permute(0, 4, 1, 2, 3)


def _pairs(x: Tensor, one: Tensor, two: Tensor, may_lack: int, *, lacking: bool) -> Tensor:
    """Frames [n, C, 2, H, W]; zeros where the neighbour (`may_lack` says which of both) is -1."""
    places = torch.stack((one, two), dim=1)  # [n, 2]
    frames = take(x, places.flatten().clamp(min=0))[0].unflatten(1, (len(one), 2)).transpose(0, 1)  # [n, C, 2, H, W]
    if not lacking:
        return frames
    absent = torch.zeros_like(places, dtype=torch.bool)
    absent[:, may_lack] = places[:, may_lack] < 0
    return frames.masked_fill(absent[:, None, :, None, None], 0)  # whatever another clip's frame there holds


def max_pool(module: nn.MaxPool3d, x: Tensor, segments: Segments) -> Tensor:
    """A max pool along time, each clip alone."""
    _check(x, segments)
    out = as_batch(module, x, segments)
    return apart(module, x, segments, window_of(module), fill=-torch.inf) if out is None else out


def avg_pool(module: nn.AvgPool3d, x: Tensor, segments: Segments) -> Tensor:
    """An average pool along time that counts its zero padding, each clip alone."""
    _check(x, segments)
    run = functools.partial(_average, module)
    out = as_batch(run, x, segments)
    return apart(run, x, segments, window_of(module)) if out is None else out


def _average(module: nn.AvgPool3d, x: Tensor) -> Tensor:
    """Torch refuses fewer features than the kernel has, even where the padding makes up for them: so zeros are added here."""
    window = window_of(module)
    missing = window.kernel - x.shape[2]
    if missing <= 0 or window.out(x.shape[2]) < 1:
        return module(x)
    return module(nn.functional.pad(x, (0, 0, 0, 0, 0, missing)))[:, :, : window.out(x.shape[2])]


def window_of(module: nn.Module) -> Window:
    """The temporal window of a convolution or pool."""
    sizes = [getattr(module, name, 1) for name in ("kernel_size", "stride", "padding", "dilation")]
    return Window(*(size if isinstance(size, int) else size[0] for size in sizes))


def framewise_pool(x: Tensor, grid: int) -> Tensor:
    """Each frame averaged over grid x grid cells, as images, which torch pools faster: [N, C, T, H, W] -> [N, T, C g g]."""
    images = x.transpose(1, 2).flatten(0, 1)  # [N T, C, H, W]
    return nn.functional.adaptive_avg_pool2d(images, grid).reshape(x.shape[0], x.shape[2], -1)


def segment_mean(x: Tensor, segments: Segments) -> Tensor:
    """Each clip's mean over time and space: [1, C, M, H, W] -> [N, C, 1, 1, 1]."""
    _check(x, segments)
    frames = framewise_pool(x, 1)[0].to(torch.promote_types(x.dtype, torch.float32))  # [M, C]
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
        padded = rows.index_select(0, segments.padded.flatten()).reshape(len(segments.lengths), -1, rows.shape[2])
        return padded.masked_fill(missing(values)[:, :, None], 0)  # whatever another clip's feature there holds

    def missing(values: Tensor) -> Tensor:  # [N, longest H W]: whether a clip has no such position
        area = values.shape[3] * values.shape[4]
        return torch.arange(max(segments.lengths) * area, device=x.device) >= segments.counts[:, None] * area

    theta, phi, g = clips(module.conv_theta(x)), clips(module.conv_phi(pooled)), clips(module.conv_g(pooled))
    absent, counts = missing(pooled), segments.counts * (pooled.shape[3] * pooled.shape[4])
    affinity = theta @ phi.transpose(1, 2)
    if module.instantiation == "softmax":
        affinity = (affinity * theta.shape[2] ** -0.5).masked_fill(absent[:, None], -torch.inf).softmax(dim=2)
    else:
        affinity = affinity / counts[:, None, None]
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
def _neighbours(lengths: tuple[int, ...], shift: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The features that have another one of their clip `shift` after them, and that other one."""
    into, first = [], 0
    for length in lengths:
        into += [first + i for i in range(length) if 0 <= i + shift < length]
        first += length
    return _on(into, device), _on([place + shift for place in into], device)


@lru_cache(maxsize=256)
def _boundaries(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
