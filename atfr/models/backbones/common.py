"""What the backbones share: how a size is chosen, and repairs to pytorchvideo's networks."""

from __future__ import annotations

from typing import Mapping, TypeVar

from torch import nn

Variant = TypeVar("Variant")
Network = TypeVar("Network", bound=nn.Module)


def variant(sizes: Mapping[str, Variant], size: str | int, *, network: str) -> Variant:
    """The entry of `sizes` for `model.size`, which arrives as a number where it looks like one.

    Raises:
        ValueError: there is no such size of this network.
    """
    if str(size) not in sizes:
        raise ValueError(f"model.size={size!r} is not a size of {network}; choose one of {', '.join(sizes)}")
    return sizes[str(size)]


def mended(network: Network) -> Network:
    """`network` itself, mended in two ways that change no result.

    pytorchvideo's shortcuts have numpy's integers for strides, which the code that torch.fx writes
    cannot hold. And a ReLU that writes over its input spares a copy of the largest tensors there are.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            module.stride = tuple(int(stride) for stride in module.stride)
        if isinstance(module, nn.ReLU):
            module.inplace = True
    return network
