"""Packed execution: clips of different length run together, each as if it were alone.

The kept features of all clips are concatenated in time, [1, C, M = sum B', H, W], and `Segments` holds their lengths.
Framewise operations (1x1x1 and spatial convolutions, batch norm, activations, residual sums) run as they are, so batch
statistics see no padding. An operation over time is replaced by one of the functions below.

In evaluation the sampling may leave gaps between clips that all operations behind it share (`segments.shared_gap`). The
contents of gaps are undefined, and no output of a clip depends on them.

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
from atfr.models.packed.kernels import depthwise, support
from atfr.models.packed.segments import Layout, Segments, Selection, Window, centres, layout, pack, padding, take, unpadded, window_of


def with_gaps(
    run: Callable[[Tensor], Tensor], x: Tensor, segments: Segments, window: Window, *, fill: float = 0.0, relu: bool = False, select: bool = True
) -> Tensor:
    """Apply `run`, an operation with this window over time, to each clip of x alone: [1, C, M, H, W] -> [1, C', M', ...].

    Clips are laid out in rows (`segments.rows_of`) with gaps of `fill` between them, as wide as the operation's padding.

    Args:
        relu: x goes through a ReLU first.
        select: False: return all outputs of the rows, with those that belong to no clip.
    """
    plan = layout(segments.lengths, window, x.device)
    padded = _spaced(x, plan, fill, relu)
    recomputed = torch.is_grad_enabled() and x.requires_grad and not _DISABLED.get()
    with _recomputed(padded, x, lambda: _spaced(x.detach(), plan, fill, relu)) if recomputed else nullcontext():
        out = by_rows(run, padded, plan.rows)
    return selected(out, plan.out) if select else out


def _spaced(x: Tensor, plan: Layout, fill: float, relu: bool) -> Tensor:
    """Lay out clips in rows: [1, C, M, H, W] -> [1, C, rows L, H, W]."""
    if kernels_take(x):
        from atfr.models.packed.kernels.rows import gather_rows

        return gather_rows(x, *plan.into, fill, relu)
    padded = take(x.relu() if relu else x, plan.source)
    return padded.index_fill(2, plan.gaps, fill) if padded.requires_grad else padded.index_fill_(2, plan.gaps, fill)


def selected(x: Tensor, selection: Selection) -> Tensor:
    """Take frames, none of them twice: [1, C, M, H, W] -> [1, C, K, H, W]."""
    if not kernels_take(x):
        return take(x, selection.slots)
    from atfr.models.packed.kernels.rows import gather_rows

    return gather_rows(x, *selection, 0.0, False)


def kernels_take(x: Tensor) -> bool:
    """Return whether Triton kernels run on packed features x [1, C, M, H, W]: on GPUs, in channels-last memory."""
    return support.triton_runs(x.device) and x.dim() == 5 and x.is_floating_point() and x.permute(0, 2, 3, 4, 1).is_contiguous()


_DISABLED: ContextVar[bool] = ContextVar("recomputation disabled", default=False)


@contextmanager
def no_recomputation() -> Iterator[None]:
    """Disable the operations' own recomputation; the outer checkpoint decides what is saved."""
    before = _DISABLED.set(True)
    try:
        yield
    finally:
        _DISABLED.reset(before)


def _recomputed(padded: Tensor, x: Tensor, make: Callable[[], Tensor]) -> torch.autograd.graph.saved_tensors_hooks:
    """Recompute `padded` from x in the backward pass instead of saving both."""
    storage, version = padded.untyped_storage().data_ptr(), x._version

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


def by_rows(run: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
    """Apply `run` to the rows of x as a batch: [1, C, rows L, H, W] -> [1, C', rows L', ...]; without copies in channels-last memory."""
    if rows == 1:
        return run(x)
    frames = x.permute(0, 2, 3, 4, 1)  # [1, rows L, H, W, C]
    return pack(run(frames.unflatten(1, (rows, -1))[0].permute(0, 4, 1, 2, 3)))


def as_batch(run: Callable[[Tensor], Tensor], x: Tensor, segments: Segments) -> Tensor | None:
    """Apply `run` to clips of one length as a batch, without a copy; return None for other clips or another memory format."""
    n = len(segments.lengths)
    if n > 1 and (len(set(segments.lengths)) > 1 or not x.permute(0, 2, 3, 4, 1).is_contiguous()):
        return None
    return by_rows(run, x, n)


def conv3d(module: nn.Conv3d, x: Tensor, segments: Segments) -> Tensor:
    """Convolve each clip alone: [1, C, M, H, W] -> [1, C', M', ...]."""
    _check(x, segments)
    if segments.layout is None and depthwise.takes(module, x.device, x.dtype):
        return depthwise.conv3d(module, x, segments.bounds)
    method, window = method_of(module, segments.lengths), window_of(module)
    if method == "subsample":
        x = selected(x, centres(segments.lengths, window, x.device))
        stride = (1, *module.stride[1:])
        return nn.functional.conv3d(x, module.weight, module.bias, stride, module.padding, module.dilation, module.groups)
    run = functools.partial(cpu.conv3d, module)
    if segments.layout is not None:
        return by_rows(run, x.index_fill_(2, segments.layout.gaps, 0), segments.layout.rows)
    out = as_batch(run, x, segments) if method == "batch" else None
    return with_gaps(run, x, segments, window) if out is None else out


def needs_rows(module: nn.Conv3d, x: Tensor, segments: Segments) -> bool:
    """Return whether `conv3d` lays out the clips in rows of its own."""
    if segments.layout is not None or depthwise.takes(module, x.device, x.dtype):
        return False
    return method_of(module, segments.lengths) == "gaps"


def conv_in_rows(module: nn.Conv3d, x: Tensor, segments: Segments, *, relu: bool, select: bool) -> Tensor:
    """Convolve each clip alone where `needs_rows`; for `relu` and `select` see `with_gaps`."""
    _check(x, segments)
    return with_gaps(functools.partial(cpu.conv3d, module), x, segments, window_of(module), relu=relu, select=select)


def method_of(module: nn.Conv3d, lengths: Sequence[int]) -> str:
    """Return the cheapest method for `conv3d` to run clips of these lengths.

    - subsample: a kernel of one feature with a stride: select the features first.
    - batch: clips of one length are a batch.
    - gaps: rows of clips, with zeros between them.
    """
    window = window_of(module)
    if window.kernel == 1 and window.padding == 0:
        return "subsample"
    return "batch" if len(set(lengths)) == 1 else "gaps"


def gap_for(module: nn.Conv3d) -> int | None:
    """Return the gap between clips that this convolution needs in a layout shared with other operations.

    None: it changes the lengths; or it has one group and costs much more than moving its features, so that the gaps would
    cost the other operations more than they save here.
    """
    window = window_of(module)
    if window.stride != 1 or window.out(1) != 1 or module.groups == 1:
        return None
    return window.padding


def max_pool(module: nn.MaxPool3d, x: Tensor, segments: Segments) -> Tensor:
    """Max-pool each clip alone."""
    _check(x, segments)
    run = functools.partial(pool3d, module)
    out = as_batch(run, x, segments)
    return with_gaps(run, x, segments, window_of(module), fill=-torch.inf) if out is None else out


def pad(module: nn.ConstantPad3d, x: Tensor, segments: Segments) -> Tensor:
    """Pad each clip alone: [1, C, M, H, W] -> [1, C, M', H', W']."""
    _check(x, segments)
    *space, front, behind = module.padding
    padded = nn.functional.pad(x, space, value=module.value) if any(space) else x
    return _spaced(padded, padding(segments.lengths, front, behind, x.device), module.value, relu=False)


def avg_pool(module: nn.AvgPool3d, x: Tensor, segments: Segments) -> Tensor:
    """Average-pool each clip alone, counting the zero padding."""
    _check(x, segments)
    run = functools.partial(_average, module)
    out = as_batch(run, x, segments)
    return with_gaps(run, x, segments, window_of(module)) if out is None else out


def _average(module: nn.AvgPool3d, x: Tensor) -> Tensor:
    """Pad a short input with zeros: torch refuses fewer features than the kernel has, even with enough padding."""
    window = window_of(module)
    missing = window.kernel - x.shape[2]
    if missing <= 0 or window.out(x.shape[2]) < 1:
        return pool3d(module, x)
    return pool3d(module, nn.functional.pad(x, (0, 0, 0, 0, 0, missing)))[:, :, : window.out(x.shape[2])]


def framewise_pool(x: Tensor, grid: int) -> Tensor:
    """Average each frame over grid x grid cells: [N, C, T, H, W] -> [N, T, C g g].

    Large cells of equal size in channels-last memory are summed over rows first, then over columns, in
    a half to a seventh of the time of torch's pooling.
    """
    images = x.transpose(1, 2).flatten(0, 1)  # [N T, C, H, W]
    height, width = images.shape[2:]
    large = height % grid == width % grid == 0 and min(height, width) >= 4 * grid > 4
    if not large or torch.jit.is_tracing() or not images.is_contiguous(memory_format=torch.channels_last):  # FLOPs are counted on the pooling
        return nn.functional.adaptive_avg_pool2d(images, grid).reshape(x.shape[0], x.shape[2], -1)
    rows, columns = height // grid, width // grid
    channels_last = images.permute(0, 2, 3, 1)  # [N T, H, W, C]
    bands = channels_last.reshape(-1, grid, rows, width * x.shape[1]).sum(2, dtype=torch.promote_types(x.dtype, torch.float32))
    cells = bands.reshape(-1, grid, grid, columns, x.shape[1]).sum(3) / (rows * columns)  # [N T, g, g, C]
    return cells.permute(0, 3, 1, 2).reshape(x.shape[0], x.shape[2], -1)


def segment_mean(x: Tensor, segments: Segments) -> Tensor:
    """Average each clip over time and space: [1, C, M, H, W] -> [N, C, 1, 1, 1]."""
    _check(x, segments)
    if segments.layout is None and kernels_take(x):
        from atfr.models.packed.kernels.clips import clip_means

        return clip_means(x, segments.owner, segments.starts)[:, :, None, None, None]
    frames = framewise_pool(x, 1)[0].to(torch.promote_types(x.dtype, torch.float32))  # [M, C]
    if segments.layout is not None:
        frames = frames.index_select(0, segments.layout.kept)
    sums = frames.new_zeros(len(segments.lengths), frames.shape[1]).index_add(0, segments.owner, frames)
    return (sums / segments.counts[:, None]).to(x.dtype)[:, :, None, None, None]


def global_pool(module: nn.Module, x: Tensor, segments: Segments) -> Tensor:
    """Run a head's global average pool: [1, C, M, H, W] -> [N, C, 1, 1, 1]."""
    return segment_mean(x, segments)


def mean(x: Tensor, segments: Segments, *, keepdim: bool) -> Tensor:
    """Compute `x.mean(dim=(2, 3, 4))` of each clip: [N, C], or [N, C, 1, 1, 1] with keepdim."""
    means = segment_mean(x, segments)
    return means if keepdim else means.flatten(1)


def norm_of_clip(module: nn.GroupNorm | nn.InstanceNorm3d, x: Tensor, segments: Segments) -> Tensor:
    """Normalise each clip by its own statistics: [1, C, M, H, W] -> [1, C, M, H, W].

    Without the modules' own check, which refuses a clip of one feature with one position.
    """
    _check(x, segments)
    cudnn = torch.backends.cudnn.enabled

    def run(clip: Tensor) -> Tensor:
        if isinstance(module, nn.GroupNorm):
            return torch.group_norm(clip, module.num_groups, module.weight, module.bias, module.eps, cudnn)
        return torch.instance_norm(clip, module.weight, module.bias, None, None, True, module.momentum or 0.0, module.eps, cudnn)

    return torch.cat([run(clip) for clip in x.split(segments.lengths, dim=2)], dim=2).contiguous(memory_format=torch.channels_last_3d)


def global_max(module: nn.Module, x: Tensor, segments: Segments) -> Tensor:
    """Run a head's global max pool on each clip: [1, C, M, H, W] -> [N, C, 1, 1, 1]."""
    _check(x, segments)
    return torch.cat([module(clip) for clip in x.split(segments.lengths, dim=2)])


def maximum(x: Tensor, segments: Segments, *, keepdim: bool) -> Tensor:
    """Compute `x.amax(dim=(2, 3, 4))` of each clip: [N, C], or [N, C, 1, 1, 1] with keepdim."""
    _check(x, segments)
    return torch.cat([clip.amax(dim=(2, 3, 4), keepdim=keepdim) for clip in x.split(segments.lengths, dim=2)])


def repeat_per_feature(values: Tensor, segments: Segments) -> Tensor:
    """Repeat one value of each clip for all of its features: [N, C, 1, 1, 1] -> [1, C, M, 1, 1]; undefined in gaps."""
    owner = segments.owner if segments.layout is None else segments.owner.index_select(0, segments.layout.source)
    return values[:, :, 0, 0, 0].index_select(0, owner).t()[None, :, :, None, None]


def squeeze_excitation(module: nn.Module, x: Tensor, segments: Segments) -> Tensor:
    """Run fvcore's SqueezeExcitation with one excitation for each clip."""
    return scale_clips(x, module.block(segment_mean(x, segments)), segments)


def scale_clips(x: Tensor, scale: Tensor, segments: Segments) -> Tensor:
    """Multiply all features of a clip by its scale: x [1, C, M, H, W], scale [N, C, 1, 1, 1] -> [1, C, M, H, W]."""
    if segments.layout is not None or scale.dtype != x.dtype or not kernels_take(x):
        return x * repeat_per_feature(scale, segments)
    from atfr.models.packed.kernels import clips

    return clips.scale_clips(x, scale[:, :, 0, 0, 0], segments.owner, segments.starts)


def non_local(module: nn.Module, x: Tensor, segments: Segments) -> Tensor:
    """Run pytorchvideo's NonLocal; a position attends to its own clip only."""
    _check(x, segments)
    pooled = x if module.pool is None else module.pool(x)

    def clips(values: Tensor) -> Tensor:  # [1, C, M, H, W] -> [N, longest H W, C]
        rows = values[0].permute(1, 2, 3, 0).flatten(1, 2)  # [M, H W, C]
        padded = rows.index_select(0, segments.padded.flatten()).reshape(len(segments.lengths), -1, rows.shape[2])
        return padded.masked_fill(missing(values)[:, :, None], 0)  # not a product: another clip's feature may hold a NaN

    def missing(values: Tensor) -> Tensor:  # [N, longest H W]: whether a clip has no such position
        area = values.shape[3] * values.shape[4]
        return torch.arange(max(segments.lengths) * area, device=x.device) >= segments.counts[:, None] * area

    theta, phi, g = (clips(cpu.conv3d(conv, y)) for conv, y in ((module.conv_theta, x), (module.conv_phi, pooled), (module.conv_g, pooled)))
    absent, counts = missing(pooled), segments.counts * (pooled.shape[3] * pooled.shape[4])
    affinity = theta @ phi.transpose(1, 2)
    if module.instantiation == "softmax":
        affinity = (affinity * theta.shape[2] ** -0.5).masked_fill(absent[:, None], -torch.inf).softmax(dim=2)
    else:
        affinity = affinity / counts[:, None, None]
    mixed = (affinity @ g).reshape(-1, *x.shape[3:], g.shape[2]).index_select(0, unpadded(segments.lengths, x.device))  # [M, H, W, C]
    out = cpu.conv3d(module.conv_out, mixed[None].permute(0, 4, 1, 2, 3))
    return x + (out if module.norm is None else module.norm(out))


def _check(x: Tensor, segments: Segments) -> None:
    if x.shape[2] != segments.num_slots:
        raise AssertionError(f"packed length {x.shape[2]} is not {segments.num_slots}, the sum of {segments.lengths} and of gaps")
