"""Names that other libraries give a network's tensors, translated to pytorchvideo's.

PySlowFast and pytorchvideo come from the same authors and build the same C2D, I3D, Slow, SlowFast and
X3D; they differ in what they call the parts, and in one batch norm of X3D. Names as in PySlowFast's
slowfast/models/{stem_helper,resnet_helper,head_helper,operators,video_model_builder}.py.

torchvision's 2D ResNet of bottleneck blocks is the C2D of one frame. Both have a stage's spatial stride
in its first 3x3 convolution. Names as in torchvision/models/resnet.py, which timm has, too.
"""

from __future__ import annotations

import re
from typing import Collection, Iterable, Mapping

import torch
from torch import Tensor

STEM = {"conv": "conv", "bn": "norm"}
# pytorchvideo calls the spatial convolution of X3D's stem conv_t, and the temporal one conv_xy.
X3D_STEM = {"conv_xy": "conv.conv_t", "conv": "conv.conv_xy", "bn": "norm"}
FUSION = {"conv_f2s": "conv_fast_to_slow", "bn": "norm"}
BLOCK = {
    "branch1": "branch1_conv",
    "branch1_bn": "branch1_norm",
    "branch2.a": "branch2.conv_a",
    "branch2.a_bn": "branch2.norm_a",
    "branch2.b": "branch2.conv_b",
    "branch2.b_bn": "branch2.norm_b",
    "branch2.c": "branch2.conv_c",
    "branch2.c_bn": "branch2.norm_c",
}
# There X3D's second norm is a sequence of the norm and squeeze-excitation, or nothing in its place.
X3D_BLOCK = {
    **BLOCK,
    "branch2.b_bn": "branch2.norm_b.0",
    "branch2.se.fc1": "branch2.norm_b.1.block.0",
    "branch2.se.fc2": "branch2.norm_b.1.block.2",
}
HEAD = {
    "conv_5": "pool.pre_conv",
    "conv_5_bn": "pool.pre_norm",
    "lin_5": "pool.post_conv",
    "lin_5_bn": "pool.post_norm",
    "projection": "proj",
}
IMAGE_STEM = {"conv1": "conv", "bn1": "norm"}
IMAGE_BLOCK = {
    "downsample.0": "branch1_conv",
    "downsample.1": "branch1_norm",
    "conv1": "branch2.conv_a",
    "bn1": "branch2.norm_a",
    "conv2": "branch2.conv_b",
    "bn2": "branch2.norm_b",
    "conv3": "branch2.conv_c",
    "bn3": "branch2.norm_c",
}
NORM_EPS = 1e-5  # of all of PySlowFast's batch norms


def is_pyslowfast(names: Iterable[str]) -> bool:
    """Whether these are names of PySlowFast's own networks (those of its PTV* are pytorchvideo's)."""
    return any(re.match(r"s1\.pathway\d_stem\.", name) for name in names)


def is_image_resnet(names: Collection[str]) -> bool:
    """Whether these are torchvision's names of a 2D ResNet."""
    return "conv1.weight" in names and "layer1.0.conv1.weight" in names


def to_pytorchvideo(names: Collection[str], own: Iterable[str]) -> dict[str, str]:
    """For each of PySlowFast's names the one in a pytorchvideo network; unknown ones stay as they are.

    `own` are that network's names. They tell where its stages are: some have pools or nothing that
    is learnt in between, and those count as blocks.
    """
    blocks = _blocks(own)
    if len(blocks) != 6:
        return {name: name for name in names}
    x3d = any(".conv_xy." in name for name in names)
    pathways = any("pathway1_" in name for name in names)
    return {name: _translated(name, blocks=blocks, x3d=x3d, pathways=pathways) or name for name in names}


def image_resnet_to_pytorchvideo(names: Collection[str], own: Iterable[str]) -> dict[str, str]:
    """For each name of torchvision's 2D ResNet the one in a pytorchvideo network; unknown ones stay as they are."""
    blocks = _blocks(own)
    if len(blocks) != 6:
        return {name: name for name in names}
    translated = {}
    for name in names:
        part, _, kind = name.rpartition(".")
        stage = re.fullmatch(r"layer([1-4])\.(\d+)\.(.+)", part)
        if part in IMAGE_STEM:
            translated[name] = f"blocks.{blocks[0]}.{IMAGE_STEM[part]}.{kind}"
        elif stage and stage[3] in IMAGE_BLOCK:
            translated[name] = f"blocks.{blocks[int(stage[1])]}.res_blocks.{stage[2]}.{IMAGE_BLOCK[stage[3]]}.{kind}"
        else:
            translated[name] = f"blocks.{blocks[-1]}.proj.{kind}" if part == "fc" else name
    return translated


def _blocks(own: Iterable[str]) -> list[int]:
    """The numbers of pytorchvideo's blocks that have parameters. Its ResNets have six: a stem, four stages and a head."""
    return sorted({int(name.split(".")[1]) for name in own if re.match(r"blocks\.\d+\.", name)})


def _translated(name: str, *, blocks: list[int], x3d: bool, pathways: bool) -> str | None:
    match = re.fullmatch(r"(?:s([1-5])(_fuse)?|head)\.(?:pathway(\d)_(?:stem|res(\d+))\.)?(.+)\.(\w+)", name)
    if match is None:
        return None
    stage, fuse, pathway, res, part, kind = match.groups()
    if stage is None:
        prefix, parts = f"blocks.{blocks[-1]}", HEAD
    elif fuse:
        prefix, parts = f"blocks.{blocks[int(stage) - 1]}.multipathway_fusion", FUSION
    else:
        prefix = f"blocks.{blocks[int(stage) - 1]}" + (f".multipathway_blocks.{pathway}" if pathways else "")
        if res is None:
            parts = X3D_STEM if x3d else STEM
        else:
            prefix += f".res_blocks.{res}"
            parts = X3D_BLOCK if x3d else BLOCK
    return f"{prefix}.{parts[part]}.{kind}" if part in parts else None


def shortcut_norms(names: Iterable[str], own: Collection[str]) -> list[str]:
    """The blocks with a norm on their shortcut that the network `own` has not.

    In X3D's first stage pytorchvideo leaves out the norm after the strided shortcut, since the
    channels do not change (pytorchvideo.models.x3d.create_x3d_res_block); PySlowFast has one.
    """
    blocks = [name.removesuffix(".branch1_norm.weight") for name in names if name.endswith(".branch1_norm.weight")]
    return [block for block in blocks if f"{block}.branch1_conv.weight" in own and f"{block}.branch1_norm.weight" not in own]


def fold_shortcut_norm(values: Mapping[str, Tensor], block: str) -> dict[str, Tensor]:
    """The tensors of a block that compute in evaluation what it does with the norm on its shortcut.

    The norm's scale goes into the convolution before it, and its shift into the last norm of the
    other branch, as the two branches are summed. `values` are the block's tensors by
    pytorchvideo's names; returns those that change.

    Raises:
        KeyError: one of the tensors is not there.
    """
    norm = {kind: values[f"{block}.branch1_norm.{kind}"].double() for kind in ("weight", "bias", "running_mean", "running_var")}
    conv, shift = f"{block}.branch1_conv.weight", f"{block}.branch2.norm_c.bias"
    scale = norm["weight"] / torch.sqrt(norm["running_var"] + NORM_EPS)
    return {
        conv: (values[conv].double() * scale.view(-1, 1, 1, 1, 1)).to(values[conv].dtype),
        shift: (values[shift].double() + norm["bias"] - norm["running_mean"] * scale).to(values[shift].dtype),
    }
