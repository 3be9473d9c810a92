"""Depthwise 3D convolutions of dense and packed features on CUDA, as operations of torch with gradients.

cuDNN runs these convolutions slowly in channels-last memory, and one channel after another for the weight gradient of one
clip. The kernels (`depthwise_triton`) take frames [M, H, W, C]: channels-last memory of packed features [1, C, M, H, W],
or of a batch [N, C, T, H, W]. For packed features, `bounds` [M, 2] int32 holds the first and the end slot of the clip of
each frame, so that clips need no gaps between them. Without bounds each element of the batch is a clip.
"""

from __future__ import annotations

import math
from typing import Any, Sequence

import torch
from torch import Tensor, nn

from atfr.models.packed.cpu import has_hooks
from atfr.models.packed.kernels import support
from atfr.models.packed.kernels.geometry import Geometry

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_TAPS = 125  # each one is written out in the kernels


def takes(module: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernels run a module on input of this type.

    Where calling the module does more than its forward, or an exported file records it, the module itself runs.
    """
    if device.type != "cuda" or not is_depthwise(module) or has_hooks(module):
        return False
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return False
    weight = module.weight
    fits = weight.dtype == dtype or (weight.dtype in DTYPES and torch.is_autocast_enabled("cuda"))
    return dtype in DTYPES and fits and weight.device == device and support.triton_runs(device)


def is_depthwise(module: nn.Module) -> bool:
    """Return whether a module is a convolution that the kernels can compute: one filter a channel, in time odd and of "same" padding."""
    if not isinstance(module, nn.Conv3d) or type(module).forward is not nn.Conv3d.forward or type(module)._conv_forward is not nn.Conv3d._conv_forward:
        return False
    if "weight" not in module._parameters or isinstance(module.padding, str) or module.padding_mode != "zeros":
        return False  # a weight that is computed in each call, or other padding
    time, taps = module.kernel_size[0], math.prod(module.kernel_size)
    same_length = time % 2 == 1 and module.stride[0] == 1 and module.padding[0] == time // 2
    one_each = module.groups == module.in_channels == module.out_channels
    return one_each and same_length and set(module.dilation) == {1} and 1 < taps <= MAX_TAPS


def conv3d(module: nn.Conv3d, x: Tensor, bounds: Tensor | None = None) -> Tensor:
    """Run a convolution that `takes` accepts: [N, C, T, H, W] -> [N, C, T, H', W'], in channels-last memory.

    Under autocast the input and the weight are rounded as torch does it; the gradient of the weight is not rounded.
    """
    if torch.is_autocast_enabled("cuda"):
        x = x.to(torch.get_autocast_dtype("cuda"))
    return torch.ops.atfr.depthwise3d(x, module.weight, module.bias, bounds, module.stride[1:], module.padding[1:])[0]


_LIBRARY = torch.library.Library("atfr", "FRAGMENT")
_LIBRARY.define("depthwise3d(Tensor x, Tensor weight, Tensor? bias, Tensor? bounds, int[] stride, int[] padding) -> (Tensor, Tensor)")
_LIBRARY.define(
    "depthwise3d_input_gradient(Tensor gradient, Tensor taps, Tensor? bounds, SymInt height, SymInt width, int[] kernel, int[] stride, int[] padding) -> Tensor"
)
_LIBRARY.define("depthwise3d_weight_gradient(Tensor gradient, Tensor x, Tensor? bounds, int[] kernel, int[] stride, int[] padding) -> Tensor")


def _output(
    x: Tensor, weight: Tensor, bias: Tensor | None, bounds: Tensor | None, stride: Sequence[int], padding: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the output and the taps [kt kh kw, C], which the input's gradient needs, too."""
    from atfr.models.packed.kernels import depthwise_triton as kernels

    out, taps = _output_like(x, weight, bias, bounds, stride, padding)
    taps.copy_(weight.flatten(1).t())
    if out.numel():
        kernels.output(_frames(x), taps, bias, bounds, _frames(out), Geometry.of(weight.shape[2:], stride, padding))
    return out, taps


def _output_like(
    x: Tensor, weight: Tensor, bias: Tensor | None, bounds: Tensor | None, stride: Sequence[int], padding: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the empty result of `_output`."""
    geometry = Geometry.of(weight.shape[2:], stride, padding)
    n, channels, frames, height, width = x.shape
    torch._check(channels == weight.shape[0], lambda: f"expected {weight.shape[0]} channels, not {channels}")
    if bounds is not None:
        torch._check(bounds.shape[0] == n * frames, lambda: f"expected the bounds of {n * frames} frames")
    out_height, out_width = geometry.out(height, width)
    torch._check(out_height > 0 and out_width > 0, lambda: f"frames of {height} x {width} are too small for a kernel of {geometry.kernel[1:]}")
    return support.empty_frames(x, (n, frames, out_height, out_width, channels)), x.new_empty((geometry.taps, channels))


def _input_gradient(
    gradient: Tensor, taps: Tensor, bounds: Tensor | None, height: int, width: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    from atfr.models.packed.kernels import depthwise_triton as kernels

    out = _input_gradient_like(gradient, taps, bounds, height, width, kernel, stride, padding)
    if out.numel():
        kernels.input_gradient(_frames(gradient), taps, bounds, _frames(out), Geometry.of(kernel, stride, padding))
    return out


def _input_gradient_like(
    gradient: Tensor, taps: Tensor, bounds: Tensor | None, height: int, width: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    n, channels, frames = gradient.shape[:3]
    return support.empty_frames(gradient, (n, frames, height, width, channels))


def _weight_gradient(
    gradient: Tensor, x: Tensor, bounds: Tensor | None, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """Return the gradient [C, 1, kt, kh, kw] in float32."""
    from atfr.models.packed.kernels import depthwise_triton as kernels

    if not gradient.numel():
        return _weight_gradient_like(gradient, x, bounds, kernel, stride, padding).zero_()
    sums = kernels.weight_gradient(_frames(gradient), _frames(x), bounds, Geometry.of(kernel, stride, padding))
    return sums.view(x.shape[1], 1, *kernel)


def _weight_gradient_like(
    gradient: Tensor, x: Tensor, bounds: Tensor | None, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    return x.new_empty((x.shape[1], 1, *kernel), dtype=torch.float32)


def _frames(x: Tensor) -> Tensor:
    """[N, C, T, H, W] -> [N, T, H, W, C], contiguous; a copy only from another memory format."""
    return x.permute(0, 2, 3, 4, 1).contiguous()


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, bounds, stride, padding = inputs
    ctx.set_materialize_grads(False)  # of the taps
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, output[1] if ctx.needs_input_grad[0] else None, bounds)
    ctx.size, ctx.geometry = x.shape[3:], (tuple(weight.shape[2:]), stride, padding)
    ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype


def _backward(ctx: Any, gradient: Tensor, _: None) -> tuple:
    x, taps, bounds = ctx.saved_tensors
    of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
    dtype, weight_dtype, bias_dtype = ctx.dtypes
    gradient = gradient.to(dtype)
    ops = torch.ops.atfr
    return (
        ops.depthwise3d_input_gradient(gradient, taps, bounds, *ctx.size, *ctx.geometry) if of_x else None,
        ops.depthwise3d_weight_gradient(gradient, x, bounds, *ctx.geometry).to(weight_dtype) if of_weight else None,
        gradient.sum((0, 2, 3, 4), dtype=torch.float32).to(bias_dtype) if of_bias else None,
        None,
        None,
        None,
    )


for _name, _run, _like in (
    ("depthwise3d", _output, _output_like),
    ("depthwise3d_input_gradient", _input_gradient, _input_gradient_like),
    ("depthwise3d_weight_gradient", _weight_gradient, _weight_gradient_like),
):
    for _device in ("CUDA", "CPU"):  # CPU: for Triton's interpreter, in tests
        _LIBRARY.impl(_name, _run, _device)
    torch.library.register_fake(f"atfr::{_name}", _like, lib=_LIBRARY)
torch.library.register_autograd("atfr::depthwise3d", _backward, setup_context=_save, lib=_LIBRARY)
