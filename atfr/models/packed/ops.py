"""Packed execution: clips of different length run together, each as if it were alone.

The kept features of all clips stand one after another in time, [1, C, M = sum B', H, W], with the
lengths beside them in `Segments`. Framewise operations (1x1x1 and spatial convolutions, batch
norm, activations, residual sums) run as they are, so batch statistics see no padding. An operation
that looks along time is replaced by one of the functions below.

In evaluation the sampling may leave gaps between clips that all operations behind it share
(`segments.shared_gap`). What is in them is arbitrary, and nothing of a clip depends on it.

In channels-last memory a frame is one contiguous block, so moving frames is a copy of blocks.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from atfr.models.packed import cpu
from atfr.models.packed.deterministic_pools import pool3d
from atfr.models.packed.segments import Segments, Window, boundaries, centres, layout, pack, rows_of, take, unpadded, window_of


def apart(run: Callable[[Tensor], Tensor], x: Tensor, segments: Segments, window: Window, *, fill: float = 0.0) -> Tensor:
    """`run`, an operation with this window along time, on each clip of x alone: [1, C, M, H, W] -> [1, C', M', ...].

    Clips are parted by gaps of `fill` as wide as the operation's padding, in rows (`segments.rows_of`).
    """
    plan = layout(segments.lengths, window, x.device)
    if not (torch.is_grad_enabled() and x.requires_grad):
        spaced = take(x, plan.source).index_fill_(2, plan.gaps, fill)
        return take(_by_rows(run, spaced, plan.rows), plan.kept)
    spaced = take(x, plan.source).index_fill(2, plan.gaps, fill)
    with nullcontext() if _KEEPING.get() else _made_again(spaced, x, lambda: take(x.detach(), plan.source).index_fill_(2, plan.gaps, fill)):
        out = _by_rows(run, spaced, plan.rows)
    return take(out, plan.kept)


_KEEPING: ContextVar[bool] = ContextVar("keeping", default=False)


@contextmanager
def nothing_made_again() -> Iterator[None]:
    """Meanwhile operations leave it to their caller what is kept for the backward pass."""
    before = _KEEPING.set(True)
    try:
        yield
    finally:
        _KEEPING.reset(before)


def _made_again(spaced: Tensor, x: Tensor, make: Callable[[], Tensor]) -> torch.autograd.graph.saved_tensors_hooks:
    """Have the backward pass of what runs in this context make `spaced` anew from x, which is kept anyhow, instead of keeping both."""
    storage, version = spaced.untyped_storage().data_ptr(), x._version

    def pack(tensor: Tensor) -> Tensor | tuple:
        if tensor.untyped_storage().data_ptr() != storage:
            return tensor
        return tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(saved: Tensor | tuple) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        if x._version != version:
            raise RuntimeError("packed features that the backward pass needs were changed in place")
        return make().as_strided(*saved)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _by_rows(run: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
    """`run` on x [1, C, rows L, H, W] as a batch of its rows: [1, C', rows L', ...]; no copies in channels-last memory."""
    if rows == 1:
        return run(x)
    frames = x.permute(0, 2, 3, 4, 1)  # [1, rows L, H, W, C]
    return pack(run(frames.unflatten(1, (rows, -1))[0].permute(0, 4, 1, 2, 3)))


def as_batch(run: Callable[[Tensor], Tensor], x: Tensor, segments: Segments) -> Tensor | None:
    """The same for clips of one length, which need no gaps: in channels-last memory they are a batch as they are.

    None where that is not so.
    """
    n = len(segments.lengths)
    if n > 1 and (len(set(segments.lengths)) > 1 or not x.permute(0, 2, 3, 4, 1).is_contiguous()):
        return None
    return _by_rows(run, x, n)


def conv3d(module: nn.Conv3d, x: Tensor, segments: Segments) -> Tensor:
    """A convolution along time in which no clip sees its neighbours: [1, C, M, H, W] -> [1, C', M', ...]."""
    _check(x, segments)
    way, window = way_of(module, segments.lengths, x.device), window_of(module)
    if way == "pick":
        x = take(x, centres(segments.lengths, window, x.device))
        stride = (1, *module.stride[1:])
        return nn.functional.conv3d(x, module.weight, module.bias, stride, module.padding, module.dilation, module.groups)
    run = functools.partial(cpu.conv3d, module)
    if segments.layout is not None:
        return _by_rows(run, x.index_fill_(2, segments.layout.gaps, 0), segments.layout.rows)
    if way == "mend":
        return _mended(module, x, segments)
    out = as_batch(run, x, segments) if way == "batch" else None
    return apart(run, x, segments, window) if out is None else out


def way_of(module: nn.Conv3d, lengths: Sequence[int], device: torch.device) -> str:
    """How `conv3d` runs clips of these lengths, by what costs least.

    - pick: a kernel of one feature that skips features: nothing to part.
    - batch: clips of one length are a batch.
    - mend: not on CPUs, where gaps are faster, a kernel of three features runs over the boundaries
      between clips as if there were none, and the two outputs at each boundary are computed again:
      less to move, and no copy of the input to keep for the backward pass.
    - gaps: clips are parted by zeros.
    """
    window = window_of(module)
    if window.kernel == 1 and window.padding == 0:
        return "pick"
    if len(set(lengths)) == 1:
        return "batch"
    if device.type != "cpu" and window == Window(3, padding=1):
        return "mend"
    return "gaps"


def gap_for(module: nn.Conv3d) -> int | None:
    """The gap between clips that this convolution needs to run on a layout that others share.

    None where it changes the lengths, or where what it costs to move the features is little beside the
    convolution, so that gaps in all other operations would cost more: a dense one over time.
    """
    window = window_of(module)
    if window.stride != 1 or window.out(1) != 1 or module.groups == 1:
        return None
    return window.padding


def wasted(module: nn.Conv3d, lengths: Sequence[int], device: torch.device) -> float:
    """Output positions that `conv3d` computes beyond those of its clips."""
    way, window = way_of(module, lengths, device), window_of(module)
    if way == "mend":
        return 2 * 2 / 3 * (len(lengths) - 1)  # two outputs a boundary, of two taps each
    if way != "gaps":
        return 0
    long, rows = rows_of(tuple(lengths), window)
    return len(rows) * window.out(long) - sum(window.out(length) for length in lengths)


def _mended(module: nn.Conv3d, x: Tensor, segments: Segments) -> Tensor:
    """Run over the boundaries, and write what belongs to the first and last feature of each clip over it."""
    lasts, before, firsts, after = boundaries(segments.lengths, x.device)
    out = cpu.conv3d(module, x)
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
    run = functools.partial(pool3d, module)
    out = as_batch(run, x, segments)
    return apart(run, x, segments, window_of(module), fill=-torch.inf) if out is None else out


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
        return pool3d(module, x)
    return pool3d(module, nn.functional.pad(x, (0, 0, 0, 0, 0, missing)))[:, :, : window.out(x.shape[2])]


def framewise_pool(x: Tensor, grid: int) -> Tensor:
    """Each frame averaged over grid x grid cells: [N, C, T, H, W] -> [N, T, C g g].

    Large cells of equal size in channels-last memory are summed over their rows and then over their columns, each
    over blocks of memory, which takes a half to a seventh of the time of torch's pooling.
    """
    images = x.transpose(1, 2).flatten(0, 1)  # [N T, C, H, W]
    height, width = images.shape[2:]
    large = height % grid == width % grid == 0 and min(height, width) >= 4 * grid > 4
    if not large or torch.jit.is_tracing() or not images.is_contiguous(memory_format=torch.channels_last):  # counting sees the pooling
        return nn.functional.adaptive_avg_pool2d(images, grid).reshape(x.shape[0], x.shape[2], -1)
    rows, columns = height // grid, width // grid
    channels_last = images.permute(0, 2, 3, 1)  # [N T, H, W, C]
    bands = channels_last.reshape(-1, grid, rows, width * x.shape[1]).sum(2, dtype=torch.promote_types(x.dtype, torch.float32))
    cells = bands.reshape(-1, grid, grid, columns, x.shape[1]).sum(3) / (rows * columns)  # [N T, g, g, C]
    return cells.permute(0, 3, 1, 2).reshape(x.shape[0], x.shape[2], -1)


def segment_mean(x: Tensor, segments: Segments) -> Tensor:
    """Each clip's mean over time and space: [1, C, M, H, W] -> [N, C, 1, 1, 1]."""
    _check(x, segments)
    frames = framewise_pool(x, 1)[0].to(torch.promote_types(x.dtype, torch.float32))  # [M, C]
    if segments.layout is not None:
        frames = frames.index_select(0, segments.layout.kept)
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
    """One value a clip for each of its features, and any in gaps: [N, C, 1, 1, 1] -> [1, C, M, 1, 1]."""
    owner = segments.owner if segments.layout is None else segments.owner.index_select(0, segments.layout.source)
    return values[:, :, 0, 0, 0].index_select(0, owner).t()[None, :, :, None, None]


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
    if x.shape[2] != segments.places:
        raise AssertionError(f"packed length {x.shape[2]} is not {segments.places}, the sum of {segments.lengths} and of gaps")
