"""Every file under configs/ composes, and what it configures can be built."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import fields

import pytest
import torch
from composed_configs import CONFIGS, composed
from omegaconf import OmegaConf
from tiers import slow_but

from atfr.cli.builders import clip_settings
from atfr.cli.config import build, check_root
from atfr.cli.predict import PredictSettings
from atfr.models.backbones.x3d import SIZES
from atfr.models.sgs.config import PRESETS, SGSConfig

MANY_GPUS = (CONFIGS.parent / "docs/many-gpus.md").read_text()


def names(group):
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


# The built-in data bring a clip of their own, all others take the model's: these two stand for all with the other models.
PAIRS = [(dataset, "x3d_sgs") for dataset in names("dataset")]
PAIRS += [(dataset, model) for dataset in ("synthetic", "kinetics400") for model in names("model") if model != "x3d_sgs"]


BUILT = ("x3d", "x3d_sgs", "slowfast_sgs", "r2plus1d", "s3d_sgs", "i3d_inception_sgs")  # in the main tier


@pytest.mark.parametrize("dataset,model", slow_but(PAIRS, lambda pair: pair[1] == "x3d_sgs" or (pair[0] == "kinetics400" and pair[1] in BUILT)))
def test_every_dataset_and_every_model_compose(dataset, model):
    config = composed(f"dataset={dataset}", f"model={model}")
    clip = clip_settings(config)
    assert clip.frames >= 1 and clip.test_short_side >= clip.crop_size
    build(config.trainer, "trainer")


@pytest.mark.parametrize("model", slow_but(names("model"), BUILT.__contains__))
def test_every_model_can_be_built_for_the_built_in_data(model):
    own = ["model.backbone._target_=torchvision.models.video.mc3_18"] if model.startswith("custom") else []
    location = ["model.sgs.after=layer2"] if model == "custom_sgs" else []
    width = ["model.sgs.width=1.0"] if model.endswith("_sgs") else []  # not calibrated
    config = composed(f"model={model}", *own, *location, *width)
    network = build(config.model, "model", num_classes=3).eval()
    clip = torch.zeros(1, 3, config.dataset.clip.frames, config.dataset.clip.crop_size, config.dataset.clip.crop_size)
    with torch.no_grad():
        assert network(clip).shape == (1, 3)


@pytest.mark.parametrize("preset", slow_but([name for name in names("model/sgs") if name not in ("off", "options")], ("atfr", "reference", "uniform").__contains__))
def test_every_preset_file_gives_the_layer_of_the_preset_with_its_name(preset):
    config = composed("model=x3d_sgs", f"model/sgs={preset}")
    (layer,) = build(config.model, "model", num_classes=3).sgs.values()
    assert layer.options == PRESETS[preset]


def test_there_is_a_file_for_every_preset_and_in_it_every_option_of_the_layer():
    assert {*names("model/sgs")} - {"off"} == {*PRESETS}
    options = OmegaConf.load(CONFIGS / "model/sgs/base/options.yaml")
    assert {*options} - {"preset"} == {field.name for field in fields(SGSConfig)}


# Each of these groups' files is composed and trained with in test_one_step.py.
TRAINED = ("experiment", "model", "dataset", "optimizer", "schedule", "trainer")
PROGRAMS = {"test": ["checkpoint=best.pt"], "export": ["checkpoint=best.pt"], "prepare": ["dataset=ucf101"]}


REST = [path.relative_to(CONFIGS) for path in sorted(CONFIGS.rglob("*.yaml")) if path.relative_to(CONFIGS).parts[0] not in TRAINED]


@pytest.mark.parametrize("path", REST, ids=str)
def test_what_no_training_chooses_composes_too(path):
    if path.parts[0] == "hydra":
        pytest.importorskip("submitit")
    if path.parent.name:
        assert OmegaConf.to_container(composed(f"{path.parent}={path.stem}"), resolve=True)
    else:
        config = composed(*PROGRAMS.get(path.stem, []), name=path.stem)
        if path.stem == "predict":
            assert set(config) == {option.name for option in dataclasses.fields(PredictSettings)}
            return
        assert config.dataset._target_.startswith("atfr.data.")


def test_the_sweep_of_the_documentation_composes_and_its_dense_networks_are_built_without_a_layer():
    pytest.importorskip("submitit")
    (command,) = [line for line in MANY_GPUS.splitlines() if "hydra/launcher=slurm" in line]
    words = [word.partition("=") for word in command.split("#")[0].split() if "=" in word]
    assert ("model", "=", "x3d_sgs,x3d") in words and ("model.sgs.num_bins", "=", "4,8,13") in words
    jobs = list(itertools.product(*([f"{key}={value}" for value in values.split(",")] for key, _, values in words)))
    assert len(jobs) == 6
    for job in jobs:
        config = composed(*job)
        network = build(config.model, "model", num_classes=3)
        sampled = [layer.options.num_bins for layer in network.sgs.values()]
        assert sampled == ([config.model.sgs.num_bins] if "model=x3d_sgs" in job else [])
        check_root(config)  # what a run folder will hold
        assert (config.model.sgs is None) == ("model=x3d" in job)


@pytest.mark.parametrize("size", SIZES)
def test_every_size_of_x3d_brings_the_clip_it_was_published_with(size):
    config = composed("dataset=kinetics400", f"model.size={size}")
    published = {"XS": (4, 160), "S": (13, 160), "M": (16, 224), "L": (16, 312), "XL": (16, 312), "tiny": (16, 48)}
    assert (config.dataset.clip.frames, config.dataset.clip.crop_size) == published[size]


QUICK_SIZES = (("r3d", "18"), ("resnet3d", "'18'"))


@pytest.mark.parametrize("model, size", slow_but([(model, size) for model in ("r2plus1d", "r3d", "mc3", "resnet3d") for size in ("18", "'18'")], QUICK_SIZES.__contains__))
def test_a_size_that_looks_like_a_number_is_one_of_the_sizes(model, size):
    config = composed("dataset=kinetics400", f"model={model}", f"model.size={size}")
    assert config.dataset.clip.frames == {"resnet3d": 32}.get(model, 16)
    assert build(config.model, "model", num_classes=3) is not None


@pytest.mark.parametrize("model", slow_but([name for name in names("model") if not name.endswith("_sgs")], lambda name: name in BUILT and name != "x3d"))
def test_every_size_that_has_a_clip_is_a_size_and_every_model_has_a_twin_with_sgs(model):
    config = composed("dataset=kinetics400", f"model={model}")
    for size in config.model.get("clips", ()):
        with torch.device("meta"):
            assert build(composed("dataset=kinetics400", f"model={model}", f"model.size={size}").model, "model", num_classes=3) is not None
    assert f"{model}_sgs" in names("model")


@pytest.mark.parametrize("model,published", [("x3d_sgs", "S"), pytest.param("r2plus1d", "R50", marks=pytest.mark.slow), pytest.param("resnet3d_sgs", "50", marks=pytest.mark.slow)])
def test_the_size_of_a_model_does_not_depend_on_the_dataset(model, published):
    for dataset in ("synthetic", "kinetics400", "videolist"):
        assert composed(f"dataset={dataset}", f"model={model}").model.size == published
    assert composed(f"model={model}", "model.size=tiny").model.size == "tiny"


@pytest.mark.parametrize("chosen", slow_but(["dataset=synthetic", "dataset=something_something_v2", "experiment=claim/uneven", "experiment=slow/ssv2"], ("dataset=synthetic", "experiment=slow/ssv2").__contains__))
def test_flops_are_those_of_the_clip_that_a_training_takes_and_of_kinetics400s_where_nothing_is_chosen(chosen):
    counted, trained = (clip_settings(composed(chosen, name=name)) for name in ("flops", "train"))
    assert counted == trained
    assert clip_settings(composed("model=r3d", name="flops")) == clip_settings(composed("model=r3d", "dataset=kinetics400"))


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_config_file_opens_with_a_comment_and_loads(path):
    assert path.read_text().startswith("#")
    OmegaConf.load(path)


def test_a_network_of_somebody_elses_can_be_trained_with_sgs_behind_any_of_its_modules():
    chosen = ("model=custom_sgs", "model.backbone._target_=torchvision.models.video.mc3_18", "model.sgs.after=[layer1,layer3.1]")
    model = build(composed(*chosen).model, "model", num_classes=3)
    assert model.execution == "packed" and list(model.sgs) == ["layer1", "layer3_1"]
    assert model.dense_network.fc.out_features == 3


@pytest.mark.parametrize(
    "overrides,message",
    [
        ([], "model.backbone._target_ is not set"),
        (["model.backbone._target_=mynet.net"], "cannot be imported: No module named 'mynet'; if it is yours, put PYTHONPATH=FOLDER in front of the command"),
        (["model.backbone._target_=torchvision.models.video.mc3_18", "model.classes_argument=classes"], "model.backbone cannot be made or run .* 'classes'"),
        (["model.backbone._target_=torchvision.models.video.mc3_18", "model.sgs.after=res2"], "after='res2' is not a stage .* choose input, the path of a module or a list of them; there are stem, layer1, layer2, layer3, layer4, avgpool, fc and what is in them"),
        (["model.backbone._target_=torchvision.models.video.mc3_18", "model.sgs.after=layer2.0.conv3"], "after='layer2.0.conv3' is not .*such as layer2.0.conv"),
        (["model.backbone._target_=torchvision.models.vgg11"], r"model.backbone cannot be made or run on two clips of \(16, 64, 64\)"),
    ],
)
def test_a_network_that_does_not_fit_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        build(composed("model=custom_sgs", *overrides).model, "model", num_classes=3)
