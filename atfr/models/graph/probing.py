"""Finds the inputs that a network can run on by trial runs, for building it and for error messages."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import Any, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

MAX_MORE_FRAMES = 64  # tried beyond those of a clip, to name the number that a network needs


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put all modules into training or evaluation mode, and each one back into its own afterwards."""
    roots = (model, getattr(model, "dense_network", model))  # a VideoNet's own network is not among its modules
    modes = {module: module.training for root in roots for module in root.modules()}
    for module in modes:
        module.training = training
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put all modules into evaluation mode, without gradients, and each one back into its own mode afterwards."""
    with in_mode(model, training=False), torch.no_grad():
        yield


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Disable the modules' forward hooks, for which a trial run is no batch."""
    hooks = [(module, module._forward_hooks, module._forward_pre_hooks) for module in model.modules()]
    for module, *_ in hooks:
        module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for module, after, before in hooks:
            module._forward_hooks, module._forward_pre_hooks = after, before


@contextmanager
def silent() -> Iterator[None]:
    """Drop what is written to stderr: torch.fx prints the code of a program that fails."""
    with redirect_stderr(StringIO()):
        yield


def check_batch(clips: Tensor, device: torch.device) -> None:
    """Raise ValueError unless these are clips [N, 3, T, H, W] for a network on this device."""
    if clips.dim() != 5 or clips.device != device:
        raise ValueError(f"clips must be [N, 3, T, H, W] on {device}, like the network, not {list(clips.shape)} on {clips.device}")
    if clips.shape[0] < 1 or clips.shape[1] != 3 or not clips.is_floating_point():
        raise ValueError(f"clips must be floating point [N, 3, T, H, W] with at least one clip, not {clips.dtype} {list(clips.shape)}")


def features_of(network: nn.Module, stem: nn.Module, clip: Tensor) -> tuple[Any, ...]:
    """Run the layers in front of SGS on a small clip, without an update of running statistics.

    Raises:
        ValueError: they fail, as those of a network for clips of another number of channels.
    """
    try:
        with evaluating(network), silent():
            return stem(clip)
    except Exception as error:  # of any type, from any operation
        raise ValueError(f"the network cannot run on a clip {list(clip.shape)}: {first_line(error)}; SGS takes clips of 3 channels, and `probe` is their frames, height and width") from error


def num_classes(network: nn.Module, clip: Tensor) -> int:
    """Return how many classes a network tells apart, by its output for a clip.

    Raises:
        ValueError: the output is not [N, classes].
    """
    logits = network(clip)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        given = list(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ValueError(f"embedding=glance learns by classifying: it needs a network that gives logits [N, classes], not {given}")
    return int(logits.shape[1])


def check_clip(network: nn.Module, frames: int, height: int, width: int) -> None:
    """Run the network on the shape of one clip, on the meta device if possible.

    Raises:
        ValueError: it fails; names the least number of frames that it can run on.
    """
    with evaluating(network):
        if _without_values(network, frames, height, width) is None:
            return
        try:
            _run(network, frames, height, width)
        except ValueError:
            raise
        except Exception as error:  # of any type, from any operation
            least = _least_frames(network, frames, height, width)
            if least is None:
                raise ValueError(f"this network cannot run on clips of {frames} frames of {height} x {width} pixels: {first_line(error)}") from error
            raise ValueError(f"clips of {frames} frames are too short for this network, which needs at least {least}") from error


def check_devices(model: nn.Module) -> None:
    """Raise ValueError, naming one of each, if parameters and buffers are on several devices."""
    found: dict[torch.device, str] = {}
    for name, tensor in _tensors(model).items():
        found.setdefault(tensor.device, name)
    if len(found) > 1:
        examples = " and ".join(f"{name} on {device}" for device, name in found.items())
        raise ValueError(f"parts of the network lie on different devices, {examples}: move all of it with model.to(device)")


def least_features(trunk: fx.GraphModule, x: Tensor, passing: Sequence[Tensor], *, name: str) -> int:
    """Return the least number of features behind layer `name` from which the plain trunk runs on every number up to that of x.

    Raises:
        ValueError: it needs all; names the module that fails on fewer.
    """
    all_finite = False
    for length in range(x.shape[2], 0, -1):
        steps = _Steps(trunk)
        try:
            out = steps.run(x[:, :, :length].contiguous(memory_format=torch.channels_last_3d), *passing)
            finite = out.device.type == "meta" or bool(out.isfinite().all())
            all_finite |= finite and length == x.shape[2]
            if len(out) == len(x) and (finite or not all_finite):  # weights may be such that no output is finite
                continue
            reason = f"{len(out)} rows come out of {len(x)} clips" if len(out) != len(x) else "NaN or an infinity comes out"
        except Exception as error:  # of any type, from any operation
            reason = first_line(error)
        if length == x.shape[2]:
            raise ValueError(f"sgs.after={name!r}: what follows does not run behind SGS, at {steps.location}: {reason}")
        if length == x.shape[2] - 1:
            raise ValueError(f"sgs.after={name!r}: what follows runs on all {length + 1} features and on no fewer, so sample at a later location. With one less, {steps.location} says: {reason}")
        return length + 1
    return 1


def least_for_batch_norm(programs: Sequence[nn.Module], layers: Sequence[nn.Module], norms: Mapping[nn.Module, str], clip: Tensor) -> tuple[int, ...]:
    """Return the least B' of each SGS layer for one clip alone with which each batch norm gets more than one value per channel.

    Args:
        programs: the stem and the packed trunk, or the network alone if it has no layers.
        norms: the batch norms and their names.

    Raises:
        ValueError: all features give one value.
    """
    stem, *trunk = programs

    def starved(most: Sequence[int]) -> str | None:
        """Return the name of a batch norm with one value per channel if each layer keeps at most these numbers."""
        with _fewest_values(norms) as values:
            features = stem(clip)
            sampled = trunk[0](*features, list(most))[1] if layers else ()
        for layer, done in zip(layers, sampled):  # in evaluation an embedding does not call its norm
            values.update({norm: done.given[0] for norm in layer.modules() if norm in norms})
        return next((norms[norm] for norm, count in values.items() if count == 1), None)

    frames, height, width = clip.shape[2:]
    least, most = [layer.min_bins for layer in layers], [frames] * len(layers)
    if starved(least) is None:
        return tuple(least)
    norm = starved(most)
    if norm is None:
        for i, low in enumerate(least):
            most[i] = low + bisect_left(range(low, frames), True, key=lambda bins: starved([*most[:i], bins, *most[i + 1 :]]) is None)
        return tuple(most)
    raise ValueError(
        f"a clip of {frames} frames of {height} x {width} pixels alone gives batch norm {norm!r} one value a channel, which it cannot be trained on:"
        " set a larger trainer.batch_size, so that every process and every part of its share (trainer.accumulate) has two clips;"
        " for a batch norm before the pooling a larger dataset.clip.crop_size does as well"
    )


@contextmanager
def _fewest_values(norms: Collection[nn.Module]) -> Iterator[dict[nn.Module, int]]:
    """Record the fewest values per channel in an input of each batch norm."""
    fewest: dict[nn.Module, int] = {}

    def record(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].numel() // inputs[0].shape[1]  # of [N, C, ...]
        fewest[norm] = min(values, fewest.get(norm, values))

    hooks = [norm.register_forward_pre_hook(record) for norm in norms]
    try:
        yield fewest
    finally:
        for hook in hooks:
            hook.remove()


class _Steps(fx.Interpreter):
    """Records the current location in the network."""

    location = "its input"

    def run_node(self, node: fx.Node) -> Any:
        stack = node.meta.get("nn_module_stack")
        self.location = f"{node.name!r} in {next(reversed(stack.values()))[0]}" if stack else repr(node.name)
        return super().run_node(node)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type if it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _run(network: nn.Module, frames: int, height: int, width: int) -> None:
    like = next(network.parameters())
    network(torch.zeros(1, 3, frames, height, width, device=like.device, dtype=like.dtype))


def _without_values(network: nn.Module, frames: int, height: int, width: int) -> Exception | None:
    """Return the error of the network on the meta device; a network that reads values fails there, too."""
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in _tensors(network).items()}
    clip = torch.empty(1, 3, frames, height, width, device="meta", dtype=next(network.parameters()).dtype)
    try:
        torch.func.functional_call(network, shapes, clip)
    except Exception as error:
        return error
    return None


def _least_frames(network: nn.Module, frames: int, height: int, width: int) -> int | None:
    tried = range(frames + 1, frames + MAX_MORE_FRAMES + 1)
    return next((t for t in tried if _without_values(network, t, height, width) is None), None)
