"""What a network can run on, found out by running it: used at its building, and to explain a failure."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Iterator, Sequence

import torch
from torch import Tensor, fx, nn

LOOKED_AT = 64  # how many more frames than a clip has are tried, to say how many a network needs


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode and without gradients; each module's own mode comes back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def check_clip(network: nn.Module, frames: int, height: int, width: int) -> None:
    """Run the network on the shape of one clip, on no device where that will do.

    Raises:
        ValueError: it cannot, with the least number of frames that it can run on.
    """
    with evaluating(network):
        if _without_values(network, frames, height, width) is None:
            return
        try:
            _run(network, frames, height, width)
        except ValueError:
            raise
        except Exception as error:  # of whatever type the operation that stumbled has
            least = _least_frames(network, frames, height, width)
            if least is None:
                raise ValueError(f"this network cannot run on clips of {frames} frames of {height} x {width} pixels: {first_line(error)}") from error
            raise ValueError(f"clips of {frames} frames are too short for this network, which needs at least {least}") from error


def check_devices(model: nn.Module) -> None:
    """Raise ValueError, naming an example of each, where parameters and buffers lie on several devices."""
    found: dict[torch.device, str] = {}
    for name, tensor in _tensors(model).items():
        found.setdefault(tensor.device, name)
    if len(found) > 1:
        places = " and ".join(f"{name} on {device}" for device, name in found.items())
        raise ValueError(f"parts of the network lie on different devices, {places}: move all of it with model.to(device)")


def least_features(trunk: fx.GraphModule, x: Tensor, passing: Sequence[Tensor], *, name: str) -> int:
    """The fewest features behind layer `name` such that the plain trunk runs on that many, and on any more up to those of x.

    Raises:
        ValueError: it needs all of them; names the module where it fails on fewer.
    """
    for length in range(x.shape[2], 0, -1):
        steps = _Steps(trunk)
        try:
            rows = len(steps.run(x[:, :, :length].contiguous(memory_format=torch.channels_last_3d), *passing))
            if rows == len(x):
                continue
            reason = f"{rows} rows come out of {len(x)} clips"
        except Exception as error:  # of whatever type the operation that stumbled has
            reason = first_line(error)
        if length == x.shape[2]:
            raise ValueError(f"model.sgs.after={name!r}: what follows does not run behind SGS, at {steps.place}: {reason}")
        if length == x.shape[2] - 1:
            raise ValueError(f"model.sgs.after={name!r}: what follows runs on all {length + 1} features and on no fewer, so sample at a later place. With one less, {steps.place} says: {reason}")
        return length + 1
    return 1


class _Steps(fx.Interpreter):
    """Remembers where in the network it is."""

    place = "its input"

    def run_node(self, node: fx.Node) -> Any:
        stack = node.meta.get("nn_module_stack")
        self.place = f"{node.name!r} in {next(reversed(stack.values()))[0]}" if stack else repr(node.name)
        return super().run_node(node)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _run(network: nn.Module, frames: int, height: int, width: int) -> None:
    like = next(network.parameters())
    network(torch.zeros(1, 3, frames, height, width, device=like.device, dtype=like.dtype))


def _without_values(network: nn.Module, frames: int, height: int, width: int) -> Exception | None:
    """What the network raises on the shape of a clip alone. It says nothing of one that looks at values."""
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in _tensors(network).items()}
    clip = torch.empty(1, 3, frames, height, width, device="meta", dtype=next(network.parameters()).dtype)
    try:
        torch.func.functional_call(network, shapes, clip)
    except Exception as error:
        return error
    return None


def _least_frames(network: nn.Module, frames: int, height: int, width: int) -> int | None:
    tried = range(frames + 1, frames + LOOKED_AT + 1)
    return next((t for t in tried if _without_values(network, t, height, width) is None), None)
