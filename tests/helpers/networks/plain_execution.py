"""The plain network on what a clip keeps, layer by layer; nothing packed is in it."""

from __future__ import annotations

import functools
import random
from typing import Callable, NamedTuple

import torch
from torch import Tensor, nn

from atfr.models.backbones.slowfast import Fusion
from atfr.models.video_net import VideoNet


def average(x: Tensor, dim: int, bins: int) -> Tensor:
    """Average as many contiguous groups of equal size (+-1) as there are bins."""
    length = x.shape[dim]
    groups = [[t for t in range(length) if t * bins // length == b] for b in range(bins)]
    return torch.stack([x.index_select(dim, torch.tensor(group)).mean(dim) for group in groups], dim)


def lateral(fusion: Fusion, fast: Tensor) -> Tensor:
    """Run the lateral connection of a fusion on the Fast features of one clip."""
    return fusion.activation(fusion.norm(fusion.conv_fast_to_slow(fast)))


def released(fusion: Fusion, slow: Tensor, fast: Tensor, slow_times: Tensor, fast_times: Tensor) -> Tensor:
    """Fuse one clip: the shorter of Slow and lateral features gets zeros on both sides, the odd one behind."""
    fused = lateral(fusion, fast)
    longest = max(slow.shape[2], fused.shape[2])
    parts = []
    for x in (slow, fused):
        missing = longest - x.shape[2]
        front = missing // 2
        parts.append(nn.functional.pad(x, (0, 0, 0, 0, front, missing - front)))
    return torch.cat(parts, dim=1)


def aligned(fusion: Fusion, slow: Tensor, fast: Tensor, slow_times: Tensor, fast_times: Tensor) -> Tensor:
    """Fuse one clip: for each Slow feature, the convolution centred on the Fast feature nearest in time."""
    conv = fusion.conv_fast_to_slow
    kernel, alpha = conv.kernel_size[0], conv.stride[0]
    fused = []
    for time in slow_times.tolist():
        distances = [abs(alpha * time - t) for t in fast_times.tolist()]
        centre = distances.index(min(distances))
        window = torch.zeros(1, fast.shape[1], kernel, *fast.shape[3:], dtype=fast.dtype)
        for k in range(kernel):
            if 0 <= centre + k - kernel // 2 < fast.shape[2]:
                window[:, :, k] = fast[:, :, centre + k - kernel // 2]
        fused.append(nn.functional.conv3d(window, conv.weight))
    return torch.cat((slow, fusion.activation(fusion.norm(torch.cat(fused, dim=2)))), dim=1)


RULES = {"released": released, "aligned": aligned}


class Kept(NamedTuple):
    """The plain network on what a clip keeps."""

    logits: Tensor
    bins: tuple[int, ...]  # of each layer
    inputs: dict[str, Tensor]  # of the modules asked for


def on_what_is_kept(net: VideoNet, paths: dict[str, str], clip: Tensor, choose: Callable[[str, int], int], watch: tuple[str, ...] = ()) -> Kept:
    """Run the original network, layer by layer, on one clip whose features are averaged behind `paths`.

    Neither torch.fx nor anything packed is in it: hooks average the modules' outputs, and a SlowFast's
    fusion is the rule as it is described. `choose` gives a layer's B' from what there is.
    """
    kept, inputs, handles = {}, {}, []
    times: dict[str, Tensor] = {}  # of a SlowFast's pathways, by their number in the modules' paths

    def sample(layer: str, path: str, output: Tensor) -> Tensor:
        kept[layer] = choose(layer, output.shape[2])
        pathway = path.split("multipathway_blocks.")[-1][0]
        before = times.get(pathway, torch.arange(float(output.shape[2])))
        if len(before) == output.shape[2]:
            times[pathway] = average(before, 0, kept[layer])
        return average(output, 2, kept[layer])

    def fuse(fusion: Fusion, slow: Tensor, fast: Tensor) -> Tensor:
        slow_times, fast_times = (times.get(p, torch.arange(float(x.shape[2]))) for p, x in (("0", slow), ("1", fast)))
        return RULES[fusion.rule](fusion, slow, fast, slow_times, fast_times)

    for layer, path in paths.items():
        hook = lambda module, args, output, layer=layer, path=path: sample(layer, path, output)  # noqa: E731
        handles.append(net.dense_network.get_submodule(path).register_forward_hook(hook))
    for path in watch:
        hook = lambda module, args, path=path: inputs.update({path: args[0].detach().clone()})  # noqa: E731
        handles.append(net.dense_network.get_submodule(path).register_forward_pre_hook(hook))
    fusions = [module for module in net.dense_network.modules() if isinstance(module, Fusion)]
    for fusion in fusions:
        fusion.forward = functools.partial(fuse, fusion)
    try:
        logits = net.dense_network(clip[None])
    finally:
        for handle in handles:
            handle.remove()
        for fusion in fusions:
            del fusion.forward
    return Kept(logits[0], tuple(kept[layer] for layer in paths), inputs)


def least(net: VideoNet, layer: str) -> int:
    """Return how few features a clip may keep at a layer."""
    return net.sgs[layer.replace(".", "_")].min_bins


def uneven(net: VideoNet, clip: int) -> Callable[[str, int], int]:
    """Choose B' of a clip: as few as possible for the first, all for the second, anything for others."""

    def choose(layer: str, given: int) -> int:
        fewest = least(net, layer)
        return (fewest, given)[clip] if clip < 2 else random.randint(fewest, given)

    return choose


def forced_of(kept: list[Kept]) -> list[tuple[int, ...]]:
    """Return for each layer the B' of each clip."""
    return list(zip(*(k.bins for k in kept)))
