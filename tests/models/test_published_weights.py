"""Published weights by name, from a local copy of the libraries' servers with files of their own untrained networks."""

from __future__ import annotations

import hashlib
import urllib.error
import urllib.request
from functools import cache
from pathlib import Path

import pytest
import torch
import torchvision
from batch_norms import spread
from pytorchvideo.models import hub
from run_tools import Outcome, run_tool, small_job
from tiers import slow_but
from torch import nn

import atfr
from atfr.models.factory import model_names
from atfr.models.pretrained.published import FITS, find_published


def library_network(name: str) -> nn.Module:
    """The untrained network that the library builds by this name."""
    library, _, network = name.partition(":")
    return torchvision.models.get_model(network) if library == "torchvision" else getattr(hub, network)(pretrained=False)


class Server:
    """A folder with the published files, and torch's folder of downloads."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.cache, self.monkeypatch = folder, folder / "cache", monkeypatch
        monkeypatch.setenv("TORCH_HOME", str(self.cache))

    def publish(self, name: str, contents: dict) -> Path:
        network = name.partition(":")[2]
        file = self.folder / f"{network.upper()}.pyth"
        torch.save(contents, file)
        if name.startswith("torchvision:"):  # the name has the start of the hash, which is checked
            file = file.rename(self.folder / f"{network}-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}.pth")
            self.monkeypatch.setattr(torchvision.models.get_model_weights(network).DEFAULT.value, "url", file.as_uri())
        else:
            self.monkeypatch.setitem(hub.x3d.checkpoint_paths, network, file.as_uri())
        return file

    def downloaded(self) -> list[str]:
        return sorted(path.name for path in (self.cache / "hub/checkpoints").glob("*"))


@pytest.fixture
def server(tmp_path, monkeypatch) -> Server:
    return Server(tmp_path, monkeypatch)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Every connection fails, and nothing is in the folder of downloads."""

    def refuse(*arguments, **options):
        raise urllib.error.URLError("[Errno -2] Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("torch.hub.urlopen", refuse)


def test_torchvisions_weights_give_our_network_torchvisions_logits_and_classes(server):
    source = spread(torchvision.models.video.mc3_18())
    file = server.publish("torchvision:mc3_18", source.state_dict())
    model = atfr.create_model("mc3_18", weights="torchvision:mc3_18").eval()
    clips = torch.randn(2, 3, 4, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(model(clips), source(clips), atol=1e-4, rtol=1e-4)
    assert server.downloaded() == [file.name]
    assert len(torchvision.models.video.MC3_18_Weights.DEFAULT.meta["categories"]) == model(clips).shape[1]


def test_pytorchvideos_weights_give_our_network_its_scores_and_are_downloaded_once(server):
    source = spread(hub.x3d_s(pretrained=False))
    file = server.publish("pytorchvideo:x3d_s", {"model_state": source.state_dict()})
    clips = torch.randn(1, 3, 13, 160, 160)  # its pool is of this size
    with torch.inference_mode():
        expected = source(clips)
        model = atfr.create_model("x3d_s", weights="pytorchvideo:x3d_s").eval()
        torch.testing.assert_close(model(clips).softmax(dim=1), expected, atol=1e-6, rtol=1e-4)
    file.unlink()
    tuned = atfr.create_model("x3d_m", 5, sgs="uniform", weights="pytorchvideo:x3d_s")  # the same network for other clips
    state, new = tuned.dense_network.state_dict(), {"blocks.5.proj.weight", "blocks.5.proj.bias"}
    assert {name for name, value in source.state_dict().items() if not torch.equal(state[name], value)} == new
    assert state["blocks.5.proj.weight"].shape[0] == 5


@cache
def our_shapes(name: str) -> dict[str, tuple[int, ...]]:
    return shapes(atfr.create_model(name, 400).dense_network)


def shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


@pytest.mark.parametrize("name", slow_but([name for name in FITS if name != "torchvision:resnet50"], ("pytorchvideo:x3d_s", "pytorchvideo:slow_r50", "torchvision:mc3_18").__contains__))
def test_every_published_name_is_of_the_networks_that_it_is_said_to_fit(name):
    found = find_published(name)
    assert found is not None and found.url.startswith("https://") and found.num_classes == 400
    with torch.device("meta"):
        expected = shapes(library_network(name))
        for network in FITS[name]:
            assert our_shapes(network) == expected, network


def test_networks_that_share_a_file_are_all_listed():
    assert {network for networks in FITS.values() for network in networks} <= set(model_names())
    assert find_published("torchvision:resnet50").num_classes is None and "R50" in FITS["torchvision:resnet50"][0].upper()


@pytest.mark.parametrize("name,network", [("torchvision:mc3_18", "mc3_18"), ("pytorchvideo:x3d_s", "x3d_s")])
def test_without_a_network_one_line_names_the_url_and_the_file_to_put_there(offline, name, network, tmp_path):
    found = find_published(name)
    with pytest.raises(ValueError) as error:
        atfr.create_model(network, weights=name)
    assert "\n" not in str(error.value) and found.url in str(error.value) and "Name or service not known" in str(error.value)
    assert str(found.file) in str(error.value) and found.file.parent == tmp_path / "cache/hub/checkpoints"
    torch.save(library_network(name).state_dict(), found.file)
    assert atfr.create_model(network, weights=name)(torch.zeros(2, 3, 4, 32, 32)).shape == (2, 400)


def test_a_file_of_another_hash_is_refused_and_not_kept(server):
    file = server.publish("torchvision:mc3_18", {"a": torch.zeros(1)})
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"cannot be downloaded \(invalid hash value"):
        atfr.create_model("mc3_18", weights="torchvision:mc3_18")
    assert server.downloaded() == []


@pytest.mark.parametrize(
    "network,weights,message",
    [
        ("x3d_s", "torchvision:r3d_18", "is for r3d_18, and this network is x3d_s; for that there is pytorchvideo:x3d_s or pytorchvideo:x3d_xs or pytorchvideo:x3d_m"),
        ("x3d_tiny", "pytorchvideo:x3d_s", "is for x3d_xs and x3d_s and x3d_m, and this network is x3d_tiny; for that there is nothing published"),
        ("r3d_18", "torchvision:r3d18", "torchvision:r3d18 does not exist; did you mean torchvision:r3d_18"),
        ("r3d_18", "torchvision:swin", "there are torchvision:r3d_18, torchvision:mc3_18, torchvision:r2plus1d_18, torchvision:s3d"),
    ],
)
def test_wrong_names_and_networks_are_refused_with_the_weights_there_are_before_a_download(offline, network, weights, message):
    with pytest.raises(ValueError, match=message):
        atfr.create_model(network, 400, weights=weights)


def test_a_name_without_its_library_is_answered_with_the_whole_name(offline):
    with pytest.raises(FileNotFoundError, match=r"weights=x3d_s does not exist, or is not a file; did you mean pytorchvideo:x3d_s\?"):
        atfr.create_model("x3d_s", 400, weights="x3d_s")
    with pytest.raises(ValueError, match="num_classes is not set"):
        atfr.create_model("x3d_s")


# ---------------------------------------------------------------- the programs


def train(videos: Path, folder: Path, *more: str) -> Outcome:
    return run_tool("train", *small_job(videos, folder, "trainer.max_steps=1", "trainer.test=false", "trainer.statistics_clips=0", *more))


@pytest.mark.parametrize("option", ["model.weights", pytest.param("init_from", marks=pytest.mark.slow)])
def test_a_training_starts_from_published_weights_and_says_what_they_expect(server, small_videos, tmp_path, option):
    source = spread(torchvision.models.video.mc3_18())
    server.publish("torchvision:mc3_18", source.state_dict())
    outcome = train(small_videos, tmp_path / "run", "model=mc3", "model.size=18", "optimizer.lr=0.0", f"{option}=torchvision:mc3_18")
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("downloading file://") == 1 and "head of 400 classes replaced by one of 2" in outcome.out
    assert "warning: torchvision:mc3_18 was trained with dataset.clip.mean=[0.43216,0.394666,0.37645] dataset.clip.std=[0.22803,0.22145,0.216989]\n" in outcome.out
    trained = torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=False)["model"]
    assert torch.equal(trained["layer2.0.conv1.0.weight"], source.state_dict()["layer2.0.conv1.0.weight"])


@pytest.mark.parametrize(
    "more,message",
    [
        (["model=x3d", "model.size=S", "model.weights=torchvision:r3d_18"], "error: model.weights=torchvision:r3d_18 is for r3d_18, and this network is x3d_s; for that there is pytorchvideo:x3d_s"),
        (["model=x3d", "model.size=S", "init_from=pytorchvideo:x3ds"], "error: init_from=pytorchvideo:x3ds does not exist; did you mean pytorchvideo:x3d_s"),
        (["model=x3d", "model.size=S", "model.weights=pytorchvideo:x3d_s"], "error: model.weights=pytorchvideo:x3d_s: https://dl.fbaipublicfiles.com/pytorchvideo/model_zoo/kinetics/X3D_S.pyth cannot be downloaded"),
    ],
)
def test_what_cannot_be_started_from_ends_a_training_in_one_line(offline, small_videos, tmp_path, more, message):
    outcome = train(small_videos, tmp_path / "run", *more)
    assert outcome.code == 1 and outcome.err.startswith(message) and outcome.err.count("\n") == 1, outcome.err


def test_a_dry_run_downloads_nothing(offline, small_videos, tmp_path):
    outcome = train(small_videos, tmp_path / "run", "model=mc3", "model.size=18", "model.weights=torchvision:mc3_18", "dry_run=true")
    assert outcome.code == 0, outcome.err
    assert not (tmp_path / "cache").exists()
