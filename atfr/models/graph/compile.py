"""Compiles the length-independent parts of a program; a new B' never recompiles.

Operations that take lengths (the sampling, and packed operations over time) depend on them in Python and are not compiled.
The pieces between them take tensors only, in which the number of features or of clips is symbolic. (On one CPU thread
there are two graphs of each: torch chooses another convolution for fewer than 16 images.)
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from atfr.models.graph.packed_program import holds_no_tensor, is_sampling
from atfr.models.graph.recompute import changed_in_place, fetched, in_pieces
from atfr.models.graph.tracing import FUNCTIONS
from atfr.models.packed.kernels import support

COMPILERS = ("g++", "clang++")
MIN_OPERATIONS = 2  # in a piece: one alone gains nothing


def compiling(program: fx.GraphModule, *, backend: str | Callable = "inductor") -> fx.GraphModule:
    """Return the same program with pieces that are compiled in their first run, once each for training and evaluation."""
    groups = [group for group in tensor_runs(program) if len(group) >= MIN_OPERATIONS]
    return in_pieces(program, groups, lambda piece: Compiled(piece, backend))


class Compiled(nn.Module):
    """A piece, compiled for any number of features (packed, [1, C, M, H, W]) or of clips ([N, ...])."""

    def __init__(self, piece: fx.GraphModule, backend: str | Callable) -> None:
        super().__init__()
        self.piece = piece
        self.run = torch.compile(piece, backend=backend)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if not all(isinstance(x, Tensor) for x in inputs):  # sizes, in a network that computes with them
            return self.piece(*inputs)
        varying = [2 if _is_packed(x) else 0 for x in inputs]
        if any(x.shape[d] == 1 for x, d in zip(inputs, varying)):
            return self.piece(*inputs)  # torch.compile treats a size of one as constant, and would recompile for others
        for x in inputs:
            support.triton_runs(x.device)  # looks where nothing is compiled
        inputs = tuple(_plain(x) if _is_packed(x) else x for x in inputs)
        for x, d in zip(inputs, varying):
            torch._dynamo.mark_dynamic(x, d)
        return self.run(*inputs)


def _is_packed(x: Tensor) -> bool:
    return x.dim() == 5 and x.shape[0] == 1


def _plain(x: Tensor) -> Tensor:
    """Return packed features in channels-last memory whose strides and base depend on the shape alone; a copy only from another memory format.

    torch.compile guards on all strides, of which that of a dimension of size one is arbitrary, and on the base of a view,
    which depends on how the clips were packed. Autograd does not know the result as a view.
    """
    frames = x.permute(0, 2, 3, 4, 1).contiguous()  # [1, M, H, W, C]
    return torch.ops.aten._unsafe_view(frames, frames.shape).permute(0, 4, 1, 2, 3)


def tensor_runs(program: fx.GraphModule) -> list[list[fx.Node]]:
    """Return the longest runs of consecutive operations that take tensors only."""
    groups: list[list[fx.Node]] = [[]]
    for node in program.graph.nodes:
        if node.op in ("get_attr", "output"):
            continue
        if node.op == "placeholder" or _takes_lengths(node, program) or changed_in_place(node, program) not in (None, *groups[-1]):
            groups.append([])
            continue
        groups[-1].append(node)
    return [group for group in groups if group]


def _takes_lengths(node: fx.Node, program: fx.GraphModule) -> bool:
    """Return whether an operation of a packed trunk takes or returns lengths; these have a module or Segments as an argument."""
    if is_sampling(node) or holds_no_tensor(node):
        return True
    if node.target in FUNCTIONS:
        return False
    return any(holds_no_tensor(i) or (i.op == "get_attr" and isinstance(fetched(program, i.target), nn.Module)) for i in node.all_input_nodes)


def require_compiler() -> None:
    """Raise ValueError without a C++ compiler."""
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
    if not any(shutil.which(name) for name in wanted):
        raise ValueError(f"trainer.compile=true needs a C++ compiler, and there is no {' or '.join(wanted)} on this machine: install one, or set CXX")
