"""Programs whose operations on tensors alone are compiled, and nothing of which is compiled anew for clips that keep other B'.

What takes lengths (the sampling, and the packed operations that look along time) depends on them in Python, and stays
as it is. Between them lie pieces that see tensors only, in which the number of features, or of clips, is a symbol. (On one CPU
thread there are two graphs of each: torch chooses another convolution for fewer than 16 images.)
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

COMPILERS = ("g++", "clang++")
WORTH_IT = 2  # operations in a piece, at least: one alone gains nothing


def compiling(program: fx.GraphModule, *, backend: str | Callable = "inductor") -> fx.GraphModule:
    """The same program with its pieces compiled when they are first run, once each for training and evaluation."""
    groups = [group for group in tensor_runs(program) if len(group) >= WORTH_IT]
    return in_pieces(program, groups, lambda piece: Compiled(piece, backend))


class Compiled(nn.Module):
    """A piece, compiled for any number of features (packed, [1, C, M, H, W]) or of clips ([N, ...])."""

    def __init__(self, piece: fx.GraphModule, backend: str | Callable) -> None:
        super().__init__()
        self.piece = piece
        self.run = torch.compile(piece, backend=backend)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if not all(isinstance(x, Tensor) for x in inputs):  # sizes, of a network that computes with them
            return self.piece(*inputs)
        varying = [2 if _is_packed(x) else 0 for x in inputs]
        if any(x.shape[d] == 1 for x, d in zip(inputs, varying)):
            return self.piece(*inputs)  # the compiler takes a size of one for a constant, and would compile others anew
        inputs = [_plain(x) if _is_packed(x) else x for x in inputs]
        for x, d in zip(inputs, varying):
            torch._dynamo.mark_dynamic(x, d)
        return self.run(*inputs)


def _is_packed(x: Tensor) -> bool:
    return x.dim() == 5 and x.shape[0] == 1


def _plain(x: Tensor) -> Tensor:
    """Packed features in channels-last memory, as if they had just been made: no copy where they are in it already.

    The compiler looks at all strides, of which that of a dimension of one is arbitrary, and at the tensor that a view is
    of, which depends on how the clips were packed. Here both follow from the shape: autograd does not know this view as one.
    """
    frames = x.permute(0, 2, 3, 4, 1).contiguous()  # [1, M, H, W, C]
    return torch.ops.aten._unsafe_view(frames, frames.shape).permute(0, 4, 1, 2, 3)


def tensor_runs(program: fx.GraphModule) -> list[list[fx.Node]]:
    """The longest runs of operations, one after another, that see tensors only."""
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
    """Whether an operation of a packed trunk takes or gives lengths; those that do have their module as an argument, or Segments."""
    if is_sampling(node) or holds_no_tensor(node):
        return True
    if node.target in FUNCTIONS:
        return False
    return any(holds_no_tensor(i) or (i.op == "get_attr" and isinstance(fetched(program, i.target), nn.Module)) for i in node.all_input_nodes)


def require_compiler() -> None:
    """Raise ValueError, in one line, where nothing can be compiled."""
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
    if not any(shutil.which(name) for name in wanted):
        raise ValueError(f"trainer.compile=true needs a C++ compiler, and there is no {' or '.join(wanted)} on this machine: install one, or set CXX")
