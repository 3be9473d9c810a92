"""The packed form of each module and function; those that are not known here are refused by name.

Your own module gets one by a method `packed_forward(self, *pairs) -> (tensor, Segments)`,
where each pair is the packed tensor and the Segments of one input.
"""

from __future__ import annotations

import operator
from typing import Any, Callable, NamedTuple

import torch
from fvcore.nn.squeeze_excitation import SqueezeExcitation
from pytorchvideo.layers.nonlocal_net import NonLocal
from pytorchvideo.layers.swish import Swish
from torch import fx, nn

from atfr.models.packed import ops
from atfr.models.packed.segments import Window, padded_window, window_of

FRAMEWISE_MODULES = (
    nn.modules.batchnorm._BatchNorm,
    nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Hardswish, Swish,
    nn.Dropout, nn.Identity,
)  # fmt: skip
FRAMEWISE_FUNCTIONS = (
    operator.add, operator.iadd, operator.sub, operator.mul, operator.imul, operator.truediv, operator.neg,
    torch.add, torch.sub, torch.mul, torch.div, torch.relu, torch.sigmoid,
    nn.functional.relu, nn.functional.silu, nn.functional.gelu, nn.functional.dropout,
)  # fmt: skip
MEAN, MAXIMUM = ("mean", torch.mean), ("amax", torch.amax)
FRAMEWISE_METHODS = ("add", "add_", "sub", "mul", "mul_", "div", "relu", "relu_", "sigmoid", "contiguous", "clone")


class NoPackedForm(ValueError):
    """A module or function may mix the features of different clips."""


class PackedOp(NamedTuple):
    """How an operation runs on packed features."""

    run: Callable | None = None  # (module, x, segments) -> x; None: the module itself
    window: Window = Window(1)  # along time
    per_clip: bool = False  # returns one value for each clip
    gap: int | None = 0  # between clips, that it needs in a shared layout; None: it cannot run with gaps


def is_leaf(module: nn.Module) -> bool:
    """Return whether a module has a packed form of its own, so that it must be a leaf of the traced graph."""
    if isinstance(module, (SqueezeExcitation, NonLocal, Swish)) or hasattr(module, "packed_forward"):
        return True
    # torch's own under another name, such as torchvision's Conv3DSimple
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in (nn.Conv3d, nn.BatchNorm3d))


def packed_op(module: nn.Module, path: str) -> PackedOp:
    """Return the packed form of a leaf module.

    Raises:
        NoPackedForm: it has none; names the module and the reason.
    """
    if isinstance(module, FRAMEWISE_MODULES):
        return PackedOp()
    if isinstance(module, SqueezeExcitation):
        return PackedOp(ops.squeeze_excitation)
    if isinstance(module, nn.ConstantPad3d):
        front, behind = module.padding[4:]
        return PackedOp(ops.pad, padded_window(front, behind), gap=None) if front or behind else PackedOp()
    if isinstance(module, nn.Conv3d):
        window = window_of(module)
        if module.padding == "same" and window.dilation * (window.kernel - 1) % 2:
            raise NoPackedForm(f"{path} behind SGS has no packed form: padding=\"same\" with an even kernel in time is not the same on both sides")
        if window == Window(1, dilation=window.dilation):
            return PackedOp()
        if module._forward_pre_hooks or type(module)._conv_forward is not nn.Conv3d._conv_forward:
            raise NoPackedForm(f"{path} behind SGS has no packed form: a convolution that computes its weight in each call")
        if module.padding_mode != "zeros":
            raise NoPackedForm(f"{path} behind SGS has no packed form: it pads in time with {module.padding_mode}")
        return PackedOp(ops.conv3d, window, gap=ops.gap_for(module))
    if isinstance(module, (nn.MaxPool3d, nn.AvgPool3d)):
        return _pool_form(module, path)
    if isinstance(module, nn.AdaptiveAvgPool3d):
        if module.output_size in (1, (1, 1, 1)):
            return PackedOp(ops.global_pool, per_clip=True)
        if isinstance(module.output_size, tuple) and module.output_size[0] is None:
            return PackedOp()
    if isinstance(module, nn.AdaptiveMaxPool3d) and module.output_size in (1, (1, 1, 1), [1, 1, 1]) and not module.return_indices:
        return PackedOp(ops.global_max, per_clip=True, gap=None)
    if isinstance(module, nn.GroupNorm) or (isinstance(module, nn.InstanceNorm3d) and not module.track_running_stats):
        return PackedOp(ops.norm_of_clip, gap=None)
    if isinstance(module, NonLocal) and (module.pool is None or window_of(module.pool) == Window(1)):
        return PackedOp(ops.non_local, gap=None)
    raise NoPackedForm(f"{path} behind SGS has no packed form: {type(module).__name__} may mix the features of different clips")


def _pool_form(module: nn.MaxPool3d | nn.AvgPool3d, path: str) -> PackedOp:
    window = window_of(module)
    if window == Window(1):
        return PackedOp()
    if module.ceil_mode or getattr(module, "return_indices", False):
        raise NoPackedForm(f"{path} behind SGS has no packed form: a pool in time with ceil_mode or return_indices")
    if isinstance(module, nn.MaxPool3d):
        return PackedOp(ops.max_pool, window, gap=None)
    if window.padding and not module.count_include_pad:
        raise NoPackedForm(f"{path} behind SGS has no packed form: an average in time that leaves its padding out")
    return PackedOp(ops.avg_pool, window, gap=None)


def is_framewise(node: fx.Node) -> bool:
    """Return whether a function or method computes each feature from that feature alone."""
    if node.op == "call_method":
        return node.target in FRAMEWISE_METHODS
    if node.target is torch.cat:
        return argument(node, 1, "dim", 0) in (1, -4)
    return node.target in FRAMEWISE_FUNCTIONS


def mean_over_clip(node: fx.Node) -> bool | None:
    """Return whether a mean over time and space keeps the dimensions; None for any other operation."""
    if node.target is nn.functional.adaptive_avg_pool3d:
        return True if argument(node, 1, "output_size", None) in (1, (1, 1, 1), [1, 1, 1]) else None
    keepdim = bool(argument(node, 2, "keepdim", False))
    if _dims(node, MEAN) == (2, 3, 4):
        return keepdim
    return False if _ends_mean(node) and begins_mean(node.args[0]) and not keepdim else None


def maximum_over_clip(node: fx.Node) -> bool | None:
    """Return whether a maximum over time and space keeps the dimensions; None for any other operation."""
    return bool(argument(node, 2, "keepdim", False)) if _dims(node, MAXIMUM) == (2, 3, 4) else None


def begins_mean(node: Any) -> bool:
    """Return whether this is the first of two steps of a mean over time and space, all of whose readers are the second one.

    `x.flatten(2).mean(2)` and `x.mean((3, 4)).mean(2)` have two steps.
    """
    if not isinstance(node, fx.Node):
        return False
    flat = node.target in ("flatten", torch.flatten) and argument(node, 1, "start_dim", 0) == 2 and argument(node, 2, "end_dim", -1) in (-1, 4)
    pooled = _dims(node, MEAN) == (3, 4) and not argument(node, 2, "keepdim", False)
    return (flat or pooled) and bool(node.users) and all(map(_ends_mean, node.users))


def _ends_mean(node: fx.Node) -> bool:
    """Return whether this averages [N, C, L] over L."""
    return node.target in MEAN and argument(node, 1, "dim", None) in (2, -1, (2,), (-1,), [2], [-1])


def _dims(node: fx.Node, targets: tuple) -> tuple[int, ...]:
    """The dimensions of [N, C, T, H, W] that one of these operations is over; () for any other operation."""
    dims = argument(node, 1, "dim", ()) if node.target in targets else ()
    return tuple(sorted(d % 5 for d in dims)) if isinstance(dims, (tuple, list)) else ()


def argument(node: fx.Node, index: int, name: str, default: Any) -> Any:
    """Return an argument of a traced call, given by position or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)
