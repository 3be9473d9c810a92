"""Weights of 2D networks, inflated over time into 3D ones."""

from __future__ import annotations

from pathlib import Path
from typing import Callable

import pytest
import torch
from batch_norms import spread
from torch import Tensor, nn
from torchvision.models import ResNet, resnet50
from torchvision.models.resnet import BasicBlock, Bottleneck

from atfr.models.backbones.r2plus1d import r2plus1d
from atfr.models.backbones.resnets import POOLED_STAGES, STAGES, c2d, i3d, slow
from atfr.models.backbones.x3d import x3d
from atfr.models.pretrained.load import load_pretrained
from atfr.models.video_net import VideoNet

IMAGE_STAGES = {"stem": "maxpool", "res2": "layer1", "res3": "layer2", "res4": "layer3", "res5": "layer4"}


@pytest.fixture(scope="module")
def resnet(tmp_path_factory) -> tuple[nn.Module, Path]:
    """torchvision's ResNet-50 with random weights, and its file."""
    torch.manual_seed(0)
    network, path = spread(resnet50(weights=None)), tmp_path_factory.mktemp("weights") / "resnet50.pth"
    torch.save(network.state_dict(), path)
    return network, path


def outputs(network: nn.Module, paths: dict[str, str], x: Tensor) -> dict[str, Tensor]:
    """What each stage gives."""
    found: dict[str, Tensor] = {}
    hooks = [network.get_submodule(path).register_forward_hook(lambda *call, name=name: found.update({name: call[2]})) for name, path in paths.items()]
    with torch.no_grad():
        network(x)
    for hook in hooks:
        hook.remove()
    return found


# The middle feature of so many frames sees no padding in time.
@pytest.mark.parametrize("build, stages, frames", [(c2d, POOLED_STAGES, 4), (i3d, POOLED_STAGES, 40), (slow, STAGES, 20)], ids=["c2d", "i3d", "slow"])
def test_every_stage_gives_on_a_repeated_image_what_the_2d_network_gives_on_the_image(resnet, build, stages, frames):
    source, path = resnet
    model = build(size="R50", num_classes=5).eval()
    report = load_pretrained(model, path)
    assert {entry.name for entry in report.new} == {name for name in model.dense_network.state_dict() if ".proj." in name}
    assert [entry.name for entry in report.skipped] == ["fc.weight", "fc.bias"]
    assert {entry.reason for entry in report.skipped} == {"head of 1000 classes replaced by one of 5"}
    assert sum(entry.inflated for entry in report.loaded) == sum(isinstance(module, nn.Conv2d) for module in source.modules()) == 53
    assert "names of torchvision's 2D ResNet" in report.as_table() and "inflated   53 tensors" in report.as_table()
    image = torch.randn(2, 3, 32, 32)
    expected = outputs(source, IMAGE_STAGES, image)
    found = outputs(model, {name: f"{path}" for name, path in stages.items()}, image[:, :, None].expand(-1, -1, frames, -1, -1))
    assert found.keys() == expected.keys()
    for name, out in found.items():
        middle = out[:, :, out.shape[2] // 2]
        torch.testing.assert_close(middle, expected[name], rtol=1e-4, atol=1e-4 * expected[name].abs().max().item(), msg=lambda text: f"{name}: {text}")


def small_resnet(block: type = Bottleneck) -> nn.Module:
    return spread(ResNet(block, [1, 1, 1, 1], num_classes=7))


REFUSED: dict[str, tuple[Callable[[], nn.Module] | None, Callable[[], VideoNet]]] = {  # None: the ResNet-50
    "convolutions cut in two": (None, lambda: r2plus1d(size="R50", num_classes=5)),
    "other channels": (None, lambda: x3d(size="tiny", num_classes=5)),
    "basic blocks": (lambda: small_resnet(BasicBlock), lambda: c2d(size="R50", num_classes=5)),
    "fewer blocks": (small_resnet, lambda: c2d(size="R50", num_classes=5)),
    "more blocks": (lambda: ResNet(Bottleneck, [3, 4, 7, 3]), lambda: c2d(size="R50", num_classes=5)),
}


@pytest.mark.parametrize("source, build", REFUSED.values(), ids=REFUSED)
def test_a_2d_file_that_does_not_fit_is_refused_and_changes_nothing(resnet, tmp_path, source, build):
    path = tmp_path / "file.pth" if source else resnet[1]
    if source:
        torch.save(source().state_dict(), path)
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"\.pth is of another network: .*2D weights are inflated only into a network of the same shape") as error:
        load_pretrained(model, path)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Net(nn.Module):
    """A network of one's own, of 2D or of 3D convolutions with the same names."""

    def __init__(self, *, in_time: bool) -> None:
        super().__init__()
        if in_time:
            self.conv, self.norm, self.pool = nn.Conv3d(3, 4, (5, 3, 1), padding=(2, 1, 0)), nn.BatchNorm3d(4), nn.AdaptiveAvgPool3d(1)
            self.extra = nn.Conv3d(4, 4, 1)
        else:
            self.conv, self.norm, self.pool = nn.Conv2d(3, 4, (3, 1), padding=(1, 0)), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1)
            self.extra = nn.Identity()
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.extra(self.norm(self.conv(x)))).flatten(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_custom_network_is_inflated_by_shape_and_keeps_what_only_it_has(tmp_path, dtype):
    source, model = spread(Net(in_time=False)), VideoNet(Net(in_time=True), stages={}, sgs=None)
    before = {name: value.clone() for name, value in model.dense_network.state_dict().items()}
    torch.save(source.to(dtype).state_dict(), tmp_path / "file.pth")
    report = load_pretrained(model, tmp_path / "file.pth")
    own, given = model.dense_network.state_dict(), source.state_dict()
    for frame in own["conv.weight"].unbind(dim=2):
        torch.testing.assert_close(frame, given["conv.weight"].float() / 5)
    for name in ("conv.bias", "norm.weight", "norm.running_var"):
        assert own[name].equal(given[name].float()), name
    assert all(own[f"extra.{kind}"].equal(before[f"extra.{kind}"]) for kind in ("weight", "bias"))
    assert [entry.name for entry in report.loaded if entry.inflated] == ["conv.weight"]
    # A head for as many classes is replaced, too: those of images are others.
    assert all(own[f"head.{kind}"].equal(before[f"head.{kind}"]) for kind in ("weight", "bias"))
    assert {(entry.name, entry.reason) for entry in report.skipped} == {(f"head.{kind}", "head of a 2D network replaced") for kind in ("weight", "bias")}


def test_a_3d_file_with_the_names_of_the_2d_resnet_is_not_taken_for_one(resnet, tmp_path):
    state = {name: value[:, :, None] if value.dim() == 4 else value for name, value in resnet[0].state_dict().items()}
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(ValueError, match="0 of 265 tensors fit .*choose the model and model.size that it was trained with"):
        load_pretrained(c2d(size="R50", num_classes=5), tmp_path / "file.pth")
