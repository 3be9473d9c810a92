"""The public API, used as a researcher would: in a plain PyTorch loop, on networks of other libraries and of their own."""

from __future__ import annotations

import copy
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_tools import ROOT
from torch import Tensor, nn

import atfr
from atfr.models.factory import BACKBONES, model_names
from atfr.models.sgs.config import PRESETS
from atfr.models.video_net import VideoNet


class Small(nn.Module):
    """A network as a user would write it, with a parameter and a buffer of its own and names that VideoNet must not take."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 1, 1, 1))
        self.register_buffer("shift", torch.zeros(3, 1, 1, 1))
        self.stem = nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU())
        self.trunk = nn.Sequential(nn.Conv3d(8, 16, 3, padding=1, stride=2), nn.BatchNorm3d(16), nn.ReLU(), nn.Conv3d(16, 24, 3, padding=1), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool3d(1)
        self.backbone = nn.Linear(24, num_classes)

    def forward(self, clips: Tensor) -> Tensor:
        return self.backbone(self.pool(self.trunk(self.stem(clips * self.scale + self.shift))).flatten(1))


def clips_of(count: int, frames: int = 16, size: int = 16) -> Tensor:
    """Clips of 1, 2, ... different scenes, each scene a constant colour with the same texture."""
    generator = torch.Generator().manual_seed(0)
    texture = torch.rand(3, 1, size, size, generator=generator)
    scenes = torch.arange(frames)[None] * (torch.arange(count)[:, None] % 6 + 1) // frames  # [N, T]
    colours = torch.rand(count, 3, 8, 1, 1, generator=generator)  # of up to eight scenes
    return texture + colours.gather(2, scenes[:, None, :, None, None].expand(-1, 3, -1, 1, 1))


def drifting(count: int, frames: int = 16, size: int = 16) -> Tensor:
    """Clips whose colours drift, each at a speed of its own."""
    generator = torch.Generator().manual_seed(1)
    steps = torch.randn(count, 3, frames, 2, 2, generator=generator) * torch.rand(count, 1, 1, 1, 1, generator=generator)
    return nn.functional.interpolate(steps.cumsum(dim=2).flatten(1, 2), (size, size)).unflatten(1, (3, frames))


@pytest.fixture(scope="module")
def small() -> nn.Module:
    torch.manual_seed(0)
    model = atfr.add_sgs(Small(), after="stem", probe=(8, 16, 16))
    atfr.calibrate(model, clips_of(12), gflops=0.5)
    return model.eval()


def test_the_package_exports_its_api_and_nothing_else_and_is_imported_quickly():
    assert set(dir(atfr)) == {"SGSConfig", "__version__", "add_sgs", "calibrate", "create_model", "load"}
    code = "import atfr, sys; print(sorted({'torch', 'hydra', 'av', 'decord', 'pytorchvideo'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'create_modell'"):
        atfr.create_modell  # noqa: B018


def test_names_of_parameters_stay_and_the_networks_own_weights_fit():
    network = Small()
    names, values = list(network.state_dict()), {name: value.clone() for name, value in network.state_dict().items()}
    model = atfr.add_sgs(network, after="stem", probe=(8, 16, 16))
    assert [name for name in model.state_dict() if not name.startswith("sgs.")] == names
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in Small().named_parameters()}
    assert all(torch.equal(model.state_dict()[name], value) for name, value in values.items())
    other = Small()
    missing, unexpected = model.load_state_dict(other.state_dict(), strict=False)
    assert unexpected == [] and all(name.startswith("sgs.") for name in missing)
    assert torch.equal(model.backbone.weight, other.backbone.weight) and type(model.stem[0]) is nn.Conv3d


def test_a_module_under_a_name_that_videonet_uses_is_refused():
    network = nn.Sequential()
    network.add_module("sgs", nn.Conv3d(3, 4, 1))
    with pytest.raises(ValueError, match="has a module 'sgs', a name that VideoNet uses itself: rename"):
        atfr.add_sgs(network, after="sgs")


def test_a_network_that_has_sgs_already_is_refused(small):
    with pytest.raises(ValueError, match="this is a VideoNet already: add_sgs takes a plain network"):
        atfr.add_sgs(small, after="stem")


def test_without_sgs_the_network_gives_what_it_gave_and_identity_gives_the_same():
    torch.manual_seed(0)
    network, clips = Small().eval(), clips_of(3)
    expected = network(clips)
    for sgs in ("identity", atfr.SGSConfig.from_preset("uniform", num_bins=16)):
        model = atfr.add_sgs(copy.deepcopy(network), after="stem", sgs=sgs, probe=(8, 16, 16)).eval()
        torch.testing.assert_close(model(clips), expected)


def test_a_clip_keeps_as_many_features_as_it_has_scenes_and_costs_accordingly(small):
    clips = clips_of(6)
    logits, sampling = small(clips, return_sampling=True)
    kept = [bins for (bins,) in sampling.bins]
    assert logits.shape == (6, 5) and torch.equal(logits, small(clips))
    assert kept == sorted(kept) and kept[0] == 1 and kept[-1] > 3
    (assignment,), (times,) = sampling.assignment, sampling.times
    assert [len(set(row.tolist())) for row in assignment] == kept and [len(t) for t in times] == kept
    assert torch.equal(assignment[0], torch.zeros(16, dtype=torch.int64)) and times[0].tolist() == [7.5]
    assert sampling.gflops.tolist() == sorted(sampling.gflops.tolist())
    for i in range(6):  # each clip as if alone
        torch.testing.assert_close(small(clips[i : i + 1])[0], logits[i], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "sgs",
    [
        *("atfr", "uniform"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("stride", "random")),
        pytest.param(atfr.SGSConfig(same_number=True), id="equally many"),
        pytest.param(atfr.SGSConfig(similarity="anchor"), id="anchor", marks=pytest.mark.slow),
        pytest.param(atfr.SGSConfig(embed_from="features"), id="features", marks=pytest.mark.slow),
    ],
)
def test_a_budget_is_met_on_the_clips_of_the_calibration(sgs):
    torch.manual_seed(0)
    model, clips = atfr.add_sgs(Small(), after="input", sgs=sgs, probe=(8, 16, 16)), drifting(24)
    for budget in (0.4, 0.8):
        found = atfr.calibrate(model, clips, gflops=budget)
        costs = model.eval()(clips, return_sampling=True)[1].gflops
        assert found == pytest.approx((costs.mean() / model.gflops_table((3, 16, 16, 16)).dense).item())
        assert budget - (0.06 if model.sgs["input"].options.has_fixed_cost else 0.02) < found <= budget + 0.01  # 1/16 where all keep equally many


@pytest.mark.parametrize("sgs", [atfr.SGSConfig(same_number=True, after=["input", "stem"]), pytest.param(atfr.SGSConfig(similarity="uniform", after=["input", "stem"]), marks=pytest.mark.slow)], ids=lambda o: o.similarity)
def test_layers_of_equal_numbers_behind_each_other_keep_what_the_budget_allows(sgs):
    model, clips = atfr.add_sgs(Small(), sgs=sgs, probe=(8, 16, 16)), drifting(4)
    found, table = atfr.calibrate(model, clips, gflops=0.5), model.gflops_table((3, 16, 16, 16))
    (kept,) = set(model.eval()(clips, return_sampling=True)[1].bins)
    assert found == pytest.approx(table.at(kept) / table.dense, rel=0.03) and 16 > kept[0] > kept[1] == round(kept[0] ** 2 / 16)
    assert table.at(kept) / table.dense <= 0.5 < table.at((kept[0] + 1, round((kept[0] + 1) ** 2 / 16))) / table.dense


@pytest.mark.slow
def test_several_layers_share_a_budget():
    model = atfr.add_sgs(Small(), after=["input", "stem"], probe=(8, 16, 16))
    found = atfr.calibrate(model, drifting(24), gflops=0.5)
    first, second = model.sgs.values()
    assert 0.4 < found <= 0.6 and first.keep_ratio == second.keep_ratio > 0.5


def test_clips_may_come_as_a_tensor_a_list_a_loader_or_a_generator():
    clips, widths = clips_of(12), []
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(clips, torch.arange(12)), batch_size=4)
    model = atfr.add_sgs(Small(), after="stem", sgs=atfr.SGSConfig(keep_ratio=0.3), probe=(8, 16, 16))
    for given in (clips, list(clips.split(3)), loader, ({"video": part} for part in clips.split(6))):
        atfr.calibrate(model, given)
        widths.append(model.sgs["stem"].width.item())
    assert max(widths) - min(widths) < 1e-6 * widths[0] and len(widths) == 4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"clips": []}, "there are no clips to calibrate on"),
        ({"clips": torch.zeros(3, 16, 16, 16)}, r"must come as tensors \[N, 3, T, H, W\], not \[3, 16, 16, 16\]"),
        ({"gflops": 0.001}, "a budget of 0.001 x dense cannot be met: one feature a clip costs"),
        ({"clips": torch.zeros(2, 3, 16, 16, 16, dtype=torch.uint8)}, r"clips must be floating point \[N, 3, T, H, W\] .*, not torch.uint8"),
        ({"clips": torch.zeros(2, 16, 3, 16, 16)}, r"clips must be .*\[2, 16, 3, 16, 16\]"),
        ({"clips": [torch.zeros(2, 3, 16, 16, 16), torch.zeros(2, 3, 8, 16, 16)]}, r"must have one shape, and there are \[3, 16, 16, 16\] and \[3, 8, 16, 16\]"),
        ({"gflops": 1.5}, "gflops is a share of the dense network's GFLOPs"),
        ({"gflops": "half"}, "gflops is a share of the dense network's GFLOPs, above 0 and at most 1, not 'half'"),
        ({"model": nn.Conv3d(3, 4, 1)}, "has no SGS layer to calibrate"),
        ({"model": atfr.add_sgs(Small(), after="stem", sgs="reference", probe=(8, 16, 16))}, "follows no budget, since its similarity=distance_to_mean"),
        ({"model": atfr.create_model("x3d_tiny", 3)}, "has no SGS layer to calibrate"),
    ],
)
def test_a_calibration_that_is_not_possible_says_why(change, reason, small):
    arguments = {"model": copy.deepcopy(small), "clips": clips_of(2), "gflops": 0.5, **change}
    with pytest.raises(ValueError, match=reason):
        atfr.calibrate(arguments.pop("model"), arguments.pop("clips"), **arguments)


def test_a_layer_that_is_not_calibrated_says_what_to_do():
    for sgs in ("atfr", "uniform"):
        with pytest.raises(ValueError, match=r"SGS after 'stem' is not calibrated: call atfr.calibrate\(model, clips\)"):
            atfr.add_sgs(Small(), after="stem", sgs=sgs, probe=(8, 16, 16))(clips_of(2))


def test_copies_pickles_and_state_dicts_give_the_same_logits(small):
    clips = clips_of(5)
    expected = small(clips)
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    again = atfr.add_sgs(Small(), after="stem", probe=(8, 16, 16))
    again.load_state_dict(small.state_dict())
    for model in (copy.deepcopy(small), torch.load(file, weights_only=False), again.eval()):
        assert not model.training and torch.equal(model(clips), expected)
    small_copy = copy.deepcopy(small)
    small_copy.stem[0].weight.data.zero_()
    assert torch.equal(small(clips), expected) and not torch.equal(small_copy(clips), expected)


@pytest.mark.parametrize("sgs", [None, "identity"])
@pytest.mark.parametrize("ways", [{}, {"compute_again": True}])
def test_a_moved_network_computes_with_the_tensors_that_it_reads_itself(sgs, ways):
    plain = Small()
    model = atfr.add_sgs(Small(), after="stem", sgs=sgs) if sgs else VideoNet(Small())
    model.prepare(**ways)
    plain.double(), model.double()
    plain.shift.normal_()
    model.load_state_dict(plain.state_dict(), strict=False)
    clips = clips_of(2).double()
    for training in (True, False):
        plain.train(training), model.train(training)
        torch.testing.assert_close(model(clips), plain(clips))
    model.float()
    assert model(clips.float()).dtype == torch.float32


def test_a_plain_training_loop_learns(small):
    torch.manual_seed(0)
    model, clips = copy.deepcopy(small).train(), clips_of(12)
    labels = (torch.arange(12) % 6 > 2).long()  # many scenes or few
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(clips), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 < losses[0] and model.scale.grad.abs().sum() > 0


@pytest.mark.slow
def test_r3d_of_torchvision_takes_sgs_and_its_weights():
    from torchvision.models.video import r3d_18

    torch.manual_seed(0)
    network, clips = r3d_18(num_classes=4), clips_of(3, size=32)
    model = atfr.add_sgs(copy.deepcopy(network), after="layer1", sgs=atfr.SGSConfig(width=0.1), probe=(8, 32, 32)).eval()
    assert set(network.state_dict()) == {name for name in model.state_dict() if not name.startswith("sgs.")}
    logits, sampling = model(clips, return_sampling=True)
    assert [bins for (bins,) in sampling.bins] == [1, 2, 3]
    torch.testing.assert_close(torch.cat([model(clip[None]) for clip in clips]), logits, atol=1e-4, rtol=0)


def test_x3d_of_pytorchvideo_takes_sgs():
    from pytorchvideo.models.x3d import create_x3d

    torch.manual_seed(0)
    network = create_x3d(input_clip_length=8, input_crop_size=32, model_num_class=4, depth_factor=1.0, width_factor=1.0, head_activation=None)
    network.blocks[-1].pool.pool = nn.AdaptiveAvgPool3d(1)
    model = atfr.add_sgs(network, after="blocks.0", sgs=atfr.SGSConfig(width=0.1), probe=(8, 32, 32)).eval()
    assert [bins for (bins,) in model(clips_of(3, 8, 32), return_sampling=True)[1].bins] == [1, 2, 3]


def test_create_model_knows_every_file_of_the_model_configs():
    files = {path.stem for path in (ROOT / "configs" / "model").glob("*.yaml")}
    assert {name for name in files if not name.endswith("_sgs")} == {*BACKBONES, "custom"}
    model = atfr.create_model("X3D-tiny", num_classes=3, sgs="atfr", dropout=0.0)
    assert model.sgs["stem"].options == PRESETS["atfr"] and model.blocks[-1].proj.out_features == 3
    assert atfr.create_model("x3d_tiny", 3, sgs="off").execution == atfr.create_model("x3d_tiny", 3).execution == "dense"
    assert model_names()["slowfast_4x16_r50"] == ("slowfast", "4x16-R50") and model_names()["x3d"] == ("x3d", "S")
    with pytest.raises(ValueError, match=r"the size is a part of the name: create_model\('slowfast_4x16_r50', ...\)"):
        atfr.create_model("slowfast", size="4x16-R50", num_classes=3)
    with pytest.raises(ValueError, match="there is no model 'x3d_q'; did you mean x3d"):
        atfr.create_model("x3d_q", 3)


def test_options_of_a_preset_are_checked():
    config = atfr.SGSConfig.from_preset("atfr", after="res3", gflops=0.4)
    assert (config.after, config.gflops, config.similarity) == ("res3", 0.4, "partition")
    assert atfr.SGSConfig.from_preset("atfr", keep_ratio=0.3).gflops is None
    assert atfr.SGSConfig.from_preset("atfr", width=0.3).used_options().keys().isdisjoint({"gflops", "keep_ratio"})
    for options, reason in (
        ({"preset": "best"}, "preset 'best' does not exist; choose one of atfr, glance, reference"),
        ({"preset": "atfr", "bins": 4}, "sgs has no option 'bins'; choose from after"),
        ({"preset": "uniform", "metric": "l1"}, "metric='l1' has no effect with similarity=uniform"),
        ({"preset": "reference", "gflops": 0.4}, "gflops=0.4 has no effect with similarity=distance_to_mean, scale=relative"),
        ({"preset": "atfr", "gflops": 0.4, "keep_ratio": 0.3}, "gflops and keep_ratio are both given"),
    ):
        with pytest.raises(ValueError, match=reason):
            atfr.SGSConfig.from_preset(**options)


@pytest.mark.slow
def test_the_wheel_works_in_an_environment_without_the_repository(tmp_path):
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    shutil.copytree(ROOT / "atfr", source / "atfr", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(source)], check=True)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    # The dependencies are this environment's; the package itself is the wheel's.
    python = tmp_path / "env" / "bin" / "python"
    site = Path(subprocess.run([python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True).stdout.strip())
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", str(wheel)], check=True)
    (site / "dependencies.pth").write_text(os.fspath(Path(torch.__file__).parent.parent) + "\n")
    script = tmp_path / "try.py"
    script.write_text(
        "import torch, atfr\n"
        f"assert atfr.__file__.startswith({str(tmp_path)!r}), atfr.__file__\n"
        "model = atfr.create_model('x3d_tiny', num_classes=4, sgs='atfr')\n"
        "clips = torch.rand(4, 3, 16, 48, 48)\n"
        "share = atfr.calibrate(model, clips, gflops=0.6)\n"
        "logits, sampling = model.eval()(clips, return_sampling=True)\n"
        "print(tuple(logits.shape), round(share, 1), len(sampling.gflops))\n"
    )
    found = subprocess.run([python, str(script)], capture_output=True, text=True, cwd=tmp_path)
    assert found.stdout.split("\n")[0] == "(4, 4) 0.6 4", found.stdout + found.stderr
