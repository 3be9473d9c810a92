"""Packed operations compared with their modules, run on every clip alone."""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor, nn

from atfr.models.packed import ops
from atfr.models.packed.segments import Segments

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}
# Uneven, with clips of one feature first, inside and last; of one length; a single clip.
LENGTHS = [(4, 1, 6, 2), (1, 7, 1, 1, 3), (3, 3), (1, 1, 1), (5,), (6, 5, 1)]


def clips_of(lengths: tuple[int, ...], channels: int = 4, *, memory: str = "channels_last", dtype: torch.dtype = torch.float64) -> Tensor:
    """Draw the packed features of clips of these lengths."""
    return torch.randn(1, channels, sum(lengths), 4, 4, dtype=dtype).contiguous(memory_format=FORMATS[memory])


def segments_of(lengths: tuple[int, ...]) -> Segments:
    """Describe clips of these lengths that have kept all of their frames."""
    return Segments(lengths, max(lengths), torch.cat([torch.arange(n, dtype=torch.float32) for n in lengths]))


def each_alone(run: nn.Module, x: Tensor, lengths: tuple[int, ...]) -> list[Tensor]:
    """Run a module on each clip by itself.

    Torch's average pool refuses fewer features than its kernel has even where its padding makes up
    for them; here the padding in time is made by hand.
    """
    pieces = [piece.contiguous() for piece in x.split(lengths, dim=2)]
    if isinstance(run, nn.AvgPool3d) and ops.window_of(run).padding:
        padding, *space = run.padding
        run = nn.AvgPool3d(run.kernel_size, run.stride, (0, *space), divisor_override=run.divisor_override)
        pieces = [nn.functional.pad(piece, (0, 0, 0, 0, padding, padding)) for piece in pieces]
    return [run(piece) for piece in pieces]


def check(run: Callable[[Tensor, Segments], Tensor], module: nn.Module, lengths: tuple[int, ...], memory: str) -> None:
    """Compare the output and the gradients of the input and of every parameter with those of each clip alone."""
    module = module.double()
    x = clips_of(lengths, memory=memory).requires_grad_()
    inputs = [x, *module.parameters()]
    alone = torch.cat(each_alone(module, x, lengths), dim=2)
    together = run(x, segments_of(lengths))
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(alone)
    expected = torch.autograd.grad(alone, inputs, upstream)
    for found, wanted in zip(torch.autograd.grad(together, inputs, upstream), expected):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    with torch.no_grad():  # in which gaps are filled in place
        torch.testing.assert_close(run(x.detach(), segments_of(lengths)), alone.detach(), rtol=1e-10, atol=1e-10)
