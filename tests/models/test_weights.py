"""Pretrained weights: files written from the source libraries' own networks load into ours."""

from __future__ import annotations

import functools
import pickle

import pytest
import torch
from batch_norms import spread
from omegaconf import OmegaConf
from pytorchvideo.models import hub
from pytorchvideo.models.csn import create_csn
from pytorchvideo.models.r2plus1d import create_r2plus1d
from pytorchvideo.models.resnet import create_resnet
from pytorchvideo.models.slowfast import create_slowfast
from pytorchvideo.models.x3d import create_x3d
from run_tools import run_tool, small_job
from tiers import slow_but
from torch import nn
from torchvision.models import video

from atfr.cli.builders import weights_given
from atfr.engine.run import checkpoint
from atfr.models.backbones.r2plus1d import r2plus1d
from atfr.models.backbones.resnets import i3d
from atfr.models.backbones.torchvision3d import r3d
from atfr.models.backbones.x3d import x3d
from atfr.models.pretrained.load import load_pretrained
from atfr.models.pretrained.names import to_pytorchvideo
from atfr.models.sgs.config import SGSConfig
from atfr.models.video_net import VideoNet

CLIP = (2, 3, 4, 32, 32)


# ---------------------------------------------------------------- the source libraries' networks


def source_x3d(classes=5):
    """pytorchvideo's own, of the size that our `tiny` has, for CLIP."""
    return spread(create_x3d(input_clip_length=4, input_crop_size=32, model_num_class=classes, width_factor=1.0, depth_factor=1.0, head_activation=None))


def source_slow(**structure):
    pooled = {"head_pool": nn.AdaptiveAvgPool3d, "stem_dim_out": 8, "stem_conv_kernel_size": (1, 7, 7)}
    return spread(create_resnet(model_num_class=5, **pooled, **structure))


def source_c2d():
    return source_slow(stage1_pool=nn.MaxPool3d, stage_conv_a_kernel_size=((1, 1, 1),) * 4)


def source_i3d():
    kernels = ((3, 1, 1), [(3, 1, 1), (1, 1, 1)], [(3, 1, 1), (1, 1, 1)], [(1, 1, 1), (3, 1, 1)])
    return source_slow(stage1_pool=nn.MaxPool3d, stage_conv_a_kernel_size=kernels)


def source_r2plus1d():
    return spread(create_r2plus1d(model_num_class=5, stem_dim_out=8, head_pool=nn.AdaptiveAvgPool3d, head_activation=None))


def source_slowfast():
    return spread(create_slowfast(model_depth=18, stem_dim_outs=(16, 2), model_num_class=5, head_pool=nn.AdaptiveAvgPool3d))


def source_csn():
    return spread(create_csn(model_num_class=5, stem_dim_out=8, head_pool=nn.AdaptiveAvgPool3d))


def logits(network, slowfast=False):
    generator = torch.Generator().manual_seed(1)
    clips = torch.randn(CLIP, generator=generator)
    with torch.no_grad():
        return network.eval()([clips[:, :, ::4], clips] if slowfast else clips)


def dense(network):
    return VideoNet(network, stages={}, sgs=None)


def assert_same_state(network, source):
    for name, value in source.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name


# ---------------------------------------------------------------- PySlowFast's names, in its own order


def bn(name):
    return [f"{name}.{kind}" for kind in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]


def native_block(name, *, shortcut, se=None):
    """resnet_helper.ResBlock; `se` is None for BottleneckTransform, else whether an X3DTransform has SE."""
    names = [f"{name}.branch1.weight", *bn(f"{name}.branch1_bn")] if shortcut else []
    names += [f"{name}.branch2.a.weight", *bn(f"{name}.branch2.a_bn"), f"{name}.branch2.b.weight", *bn(f"{name}.branch2.b_bn")]
    if se:
        names += [f"{name}.branch2.se.{fc}.{kind}" for fc in ("fc1", "fc2") for kind in ("weight", "bias")]
    return [*names, f"{name}.branch2.c.weight", *bn(f"{name}.branch2.c_bn")]


def native_stages(depths, *, pathways=1, x3d=False):
    """video_model_builder's s2 to s5, each with its fusion where there are two pathways."""
    for stage, depth in zip((2, 3, 4, 5), depths):
        for pathway in range(pathways):
            for i in range(depth):
                yield from native_block(f"s{stage}.pathway{pathway}_res{i}", shortcut=i == 0, se=i % 2 == 0 if x3d else None)
        if pathways == 2 and stage < 5:
            yield from [f"s{stage}_fuse.conv_f2s.weight", *bn(f"s{stage}_fuse.bn")]


PROJECTION = ["head.projection.weight", "head.projection.bias"]


def native_resnet(depths=(3, 4, 6, 3)):
    return ["s1.pathway0_stem.conv.weight", *bn("s1.pathway0_stem.bn"), *native_stages(depths), *PROJECTION]


def native_slowfast(depths=(1, 1, 1, 1)):
    stems = [name for p in (0, 1) for name in (f"s1.pathway{p}_stem.conv.weight", *bn(f"s1.pathway{p}_stem.bn"))]
    return [*stems, "s1_fuse.conv_f2s.weight", *bn("s1_fuse.bn"), *native_stages(depths, pathways=2), *PROJECTION]


def native_x3d(depths=(1, 2, 5, 3)):
    stem = ["s1.pathway0_stem.conv_xy.weight", "s1.pathway0_stem.conv.weight", *bn("s1.pathway0_stem.bn")]
    head = ["head.conv_5.weight", *bn("head.conv_5_bn"), "head.lin_5.weight", *PROJECTION]
    return [*stem, *native_stages(depths, x3d=True), *head]


def as_pyslowfast(network, names):
    """A PySlowFast checkpoint of pytorchvideo's network: both define their layers in the same order."""
    state = network.state_dict()
    return {"epoch": 3, "model_state": dict(zip(names, state.values(), strict=True)), "optimizer_state": {"state": {}}, "cfg": "TRAIN: {}"}


# ---------------------------------------------------------------- tests: files that fit


@pytest.mark.parametrize("zipped", [True, False])
def test_a_zoo_file_of_pytorchvideo_gives_our_x3d_its_logits(tmp_path, zipped):
    source = source_x3d()
    torch.save({"model_state": source.state_dict()}, tmp_path / "zoo.pyth", _use_new_zipfile_serialization=zipped)
    model = x3d(size="tiny", num_classes=5)
    report = load_pretrained(model, tmp_path / "zoo.pyth")
    assert torch.allclose(logits(model), logits(source), atol=1e-5)
    assert not report.skipped and not report.new
    assert sum(entry.size for entry in report.loaded) == sum(v.numel() for n, v in source.state_dict().items() if "num_batches" not in n)


def source_r3d():
    return spread(video.r3d_18(num_classes=5))


def source_torchvision_r2plus1d():
    return spread(video.r2plus1d_18(num_classes=5))


def plain(state):
    return state


def wrapped(state):
    return {"state_dict": {f"module.model.{name}": v for name, v in state.items()}}


SOURCES = [source_slow, source_c2d, source_i3d, source_r2plus1d, source_slowfast, source_csn, source_r3d, source_torchvision_r2plus1d]
# Each library's names once, and each wrapper.
QUICK = {(source_slowfast, plain), *((build, wrapped) for build in SOURCES[:-1])}


@pytest.mark.parametrize("build, wrap", slow_but([(build, wrap) for build in SOURCES for wrap in (plain, wrapped)], QUICK.__contains__))
def test_state_dicts_of_the_libraries_load_with_and_without_wrappers(tmp_path, build, wrap):
    source, network = build(), build()
    torch.save(wrap(source.state_dict()), tmp_path / "file")
    report = load_pretrained(dense(network), tmp_path / "file")
    assert_same_state(network, source)
    assert not report.skipped and not report.new


@pytest.mark.parametrize("build", [video.mc3_18, pytest.param(video.s3d, marks=pytest.mark.slow)])
def test_the_head_of_torchvision_is_replaced_for_another_number_of_classes(tmp_path, build):
    source, network = build(num_classes=9), build(num_classes=4)
    torch.save(source.state_dict(), tmp_path / "vision.pth")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    report = load_pretrained(dense(network), tmp_path / "vision.pth")
    head = [name for name in source.state_dict() if name.startswith(("fc.", "classifier."))]
    assert [entry.name for entry in report.new] == [f"{name}" for name in head]
    assert {(entry.name, entry.reason) for entry in report.skipped} == {(name, "head of 9 classes replaced by one of 4") for name in head}
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name] if name in head else source.state_dict()[name]), name
    assert "head of 9 classes replaced by one of 4" in report.as_table()


@pytest.mark.parametrize(
    "build,names",
    [
        (source_slow, native_resnet()),
        (source_c2d, native_resnet()),
        pytest.param(source_i3d, native_resnet(), marks=pytest.mark.slow),
        (source_slowfast, native_slowfast()),
    ],
)
def test_pyslowfasts_own_names_are_understood(tmp_path, build, names):
    source, network = build(), build()
    torch.save(as_pyslowfast(source, names), tmp_path / "native.pyth")
    report = load_pretrained(dense(network), tmp_path / "native.pyth")
    assert_same_state(network, source)
    assert not report.skipped and not report.new and "names of PySlowFast" in report.as_table()
    slowfast = build is source_slowfast
    assert torch.allclose(logits(network, slowfast), logits(source, slowfast), atol=1e-5)


def test_pyslowfasts_x3d_has_a_norm_that_pytorchvideos_has_not_and_gives_the_same_logits(tmp_path):
    source = source_x3d()
    # As resnet_helper.ResBlock has it: a norm on every shortcut with a stride.
    first = source.blocks[1].res_blocks[0]
    branch2 = first._modules.pop("branch2")
    first.branch1_norm = spread(nn.Sequential(nn.BatchNorm3d(first.branch1_conv.out_channels)))[0]
    first.branch2 = branch2  # behind it, as PySlowFast has it
    torch.save(as_pyslowfast(source, native_x3d()), tmp_path / "x3d.pyth")
    model = x3d(size="tiny", num_classes=5)
    report = load_pretrained(model, tmp_path / "x3d.pyth")
    assert torch.allclose(logits(model), logits(source), atol=1e-5)
    assert not report.skipped and not report.new
    assert report.notes == ("s2.pathway0_res0.branch1_bn is folded into blocks.1.res_blocks.0, which has no norm there: the same in evaluation",)


@pytest.mark.slow
@pytest.mark.parametrize(
    "build, source",
    [
        (functools.partial(i3d, size="R50"), hub.i3d_r50),
        (functools.partial(r2plus1d, size="R50"), hub.r2plus1d_r50),
        (functools.partial(r2plus1d, size="18"), lambda **_: video.r2plus1d_18(num_classes=400)),
        (functools.partial(r3d, size="18"), lambda **_: video.r3d_18(num_classes=400)),
    ],
    ids=["i3d R50", "r2plus1d R50", "r2plus1d 18", "r3d 18"],
)
def test_a_published_networks_file_fills_ours_with_and_without_sgs(tmp_path, build, source):
    network = source(pretrained=False)
    torch.save({"model_state": network.state_dict()}, tmp_path / "zoo.pyth")
    for sgs in (None, SGSConfig.from_preset("reference")):
        model = build(num_classes=400, sgs=sgs)
        report = load_pretrained(model, tmp_path / "zoo.pyth")
        assert_same_state(model.dense_network, network)
        assert not report.skipped and all(entry.name.startswith("sgs.") for entry in report.new)


@pytest.mark.parametrize(
    "native,ours",
    [
        ("s1.pathway0_stem.conv_xy.weight", "blocks.0.conv.conv_t.weight"),
        ("s1.pathway0_stem.conv.weight", "blocks.0.conv.conv_xy.weight"),
        ("s1.pathway0_stem.bn.running_var", "blocks.0.norm.running_var"),
        ("s4.pathway0_res2.branch2.b_bn.weight", "blocks.3.res_blocks.2.branch2.norm_b.0.weight"),
        ("s4.pathway0_res2.branch2.se.fc1.bias", "blocks.3.res_blocks.2.branch2.norm_b.1.block.0.bias"),
        ("s4.pathway0_res2.branch2.se.fc2.weight", "blocks.3.res_blocks.2.branch2.norm_b.1.block.2.weight"),
        ("s3.pathway0_res0.branch1_bn.bias", "blocks.2.res_blocks.0.branch1_norm.bias"),
        ("head.conv_5_bn.weight", "blocks.5.pool.pre_norm.weight"),
        ("head.lin_5.weight", "blocks.5.pool.post_conv.weight"),
        ("head.projection.bias", "blocks.5.proj.bias"),
    ],
)
def test_names_of_x3d_written_down_from_both_libraries(native, ours):
    own = source_x3d().state_dict()
    assert ours in own and to_pytorchvideo(native_x3d(), own)[native] == ours


# ---------------------------------------------------------------- tests: files that fit in part, or not


def test_a_tensor_of_another_shape_is_skipped_with_both_shapes(tmp_path):
    state = source_x3d().state_dict()
    state["blocks.0.conv.conv_t.weight"] = torch.zeros(12, 3, 1, 5, 5)
    state["blocks.9.weight"] = torch.zeros(2)
    state["blocks.5.proj.weight"] = state["blocks.5.proj.weight"][:, :, None, None, None]  # as a convolution has it
    torch.save(state, tmp_path / "file")
    report = load_pretrained(x3d(size="tiny", num_classes=5), tmp_path / "file")
    shape = list(x3d(size="tiny", num_classes=5).dense_network.state_dict()["blocks.0.conv.conv_t.weight"].shape)
    reasons = {entry.name: entry.reason for entry in report.skipped}
    assert reasons == {"blocks.0.conv.conv_t.weight": f"shape [12, 3, 1, 5, 5], {shape} in this network", "blocks.9.weight": "no such tensor in this network"}
    assert [entry.name for entry in report.new] == ["blocks.0.conv.conv_t.weight"]


@pytest.mark.parametrize("build,names", [(lambda: video.mc3_18(), "stem.0.weight"), (lambda: source_slow(), "blocks.0.conv.weight")])
def test_a_file_of_another_network_is_refused_and_changes_nothing(tmp_path, build, names):
    torch.save(build().state_dict(), tmp_path / "file")
    model = x3d(size="tiny", num_classes=5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"is of another network: .*the file holds {names}.*the network has blocks.0.conv.conv_t.weight.*model.size") as error:
        load_pretrained(model, tmp_path / "file")
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_file_of_a_deeper_network_is_noted(tmp_path):
    deeper = create_x3d(model_num_class=5, width_factor=1.0, depth_factor=2.2)
    torch.save(deeper.state_dict(), tmp_path / "file")
    report = load_pretrained(x3d(size="tiny", num_classes=5), tmp_path / "file")
    assert not report.new and "tensors that this network has no place for: is it of another model.size?" in report.notes[0]
    torch.save(x3d(size="tiny", num_classes=5).dense_network.state_dict(), tmp_path / "file")
    with pytest.raises(ValueError, match=r"first difference: blocks.1.res_blocks.1.branch2.conv_a.weight is missing there"):
        load_pretrained(dense(deeper), tmp_path / "file")


def test_the_table_is_short_however_many_tensors_do_not_fit(tmp_path):
    state = source_x3d().state_dict()
    for name in [name for name in state if name.startswith("blocks.4.")]:
        state[name] = torch.zeros(*state[name].shape, 3) if state[name].dim() else state[name]
    torch.save(state, tmp_path / "file")
    table = load_pretrained(x3d(size="tiny", num_classes=5), tmp_path / "file").as_table()
    assert len(table.splitlines()) <= 8 and max(map(len, table.splitlines())) < 300 and "for other such reasons" in table


class Shouting:
    def __reduce__(self):
        return print, ("code from the file runs",)


def write_whole_model(path):
    torch.save(video.mc3_18(), path)


def write_code(path):
    torch.save({"model_state": {"a": torch.zeros(1)}, "extra": Shouting()}, path)


def write_cut(path):
    torch.save({"model_state": source_x3d().state_dict()}, path)
    path.write_bytes(path.read_bytes()[:5000])


def write_cut_legacy(path):
    torch.save({"model_state": source_x3d().state_dict()}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:5000])


def write_caffe2(path):
    path.write_bytes(pickle.dumps({"blobs": {}}))


def write_no_tensors(path):
    torch.save({"epoch": 3, "model": {"name": "x3d"}}, path)


@pytest.mark.parametrize(
    "write,message",
    [
        (write_whole_model, "is not read: besides tensors it holds torchvision.models.video.resnet.VideoResNet"),
        (write_code, "besides tensors it holds .*print, which could run code"),
        (write_cut, "cannot be read: it is damaged"),
        (write_cut_legacy, "cannot be read: it is damaged"),
        (write_caffe2, "was not written by torch.save .*Caffe2"),
        (lambda path: path.write_bytes(b""), "was not written by torch.save"),
        (write_no_tensors, "holds no weights: it has the keys epoch, model"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, capsys, write, message):
    path = tmp_path / "weights"
    write(path)
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(x3d(size="tiny", num_classes=5), path)
    assert "\n" not in str(error.value) and f"model.weights={path}" in str(error.value)
    assert "code from the file runs" not in capsys.readouterr().out


def test_a_file_that_is_not_there_is_named_with_its_key(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"model.weights={tmp_path}/nowhere.pyth"):
        load_pretrained(x3d(size="tiny", num_classes=5), tmp_path / "nowhere.pyth")


# ---------------------------------------------------------------- tests: our own checkpoints


def save_own(model, path):
    checkpoint.save({"model": model.state_dict(), "config": {}, "choices": {}, "class_names": ["a"]}, path)


def sampled(**options):
    return x3d(size="tiny", num_classes=5, sgs=SGSConfig.from_preset("reference", **options))


def with_width(**options):
    return sampled(similarity="anchor", scale="absolute", kernel="mean", embedding="pooled", **options)


def test_our_checkpoints_go_from_the_dense_network_to_one_that_samples_and_back(tmp_path):
    source = dense(source_x3d())
    save_own(source, tmp_path / "dense.pt")
    model = sampled()
    report = load_pretrained(model, tmp_path / "dense.pt")
    assert_same_state(model.dense_network, source.dense_network)
    assert not report.skipped and report.new and all(entry.name.startswith("sgs.") for entry in report.new)

    save_own(model, tmp_path / "sampled.pt")
    back = x3d(size="tiny", num_classes=5)
    report = load_pretrained(back, tmp_path / "sampled.pt")
    assert_same_state(back.dense_network, source.dense_network)
    assert not report.new and {entry.reason for entry in report.skipped} == {"this network does not sample"}

    other = sampled()
    report = load_pretrained(other, tmp_path / "sampled.pt")
    assert_same_state(other, model)
    assert not report.new and not report.skipped and "a checkpoint of this project" in report.as_table()


def test_a_sampling_layer_that_fits_in_part_stays_new(tmp_path):
    save_own(sampled(), tmp_path / "sampled.pt")
    other = sampled(embedding_dim=4)
    before = {name: value.clone() for name, value in other.sgs.state_dict().items()}
    report = load_pretrained(other, tmp_path / "sampled.pt")
    assert before and all(torch.equal(value, before[name]) for name, value in other.sgs.state_dict().items())
    reasons = {entry.name: entry.reason for entry in report.skipped}
    assert reasons["sgs.res2.embedding.out.weight"].startswith("shape [8, ")
    assert reasons["sgs.res2.embedding.hidden.weight"] == "not loaded without the tensors beside it, which do not fit"


def test_a_width_is_taken_over_unless_it_is_set(tmp_path):
    model, tracking, fixed = with_width(), with_width(), with_width(width=0.75)
    model.sgs["res2"].width.fill_(0.25)
    save_own(model, tmp_path / "sampled.pt")
    assert not load_pretrained(tracking, tmp_path / "sampled.pt").skipped
    assert tracking.sgs["res2"].width == 0.25
    report = load_pretrained(fixed, tmp_path / "sampled.pt")
    assert fixed.sgs["res2"].width == 0.75
    assert [(entry.name, entry.reason) for entry in report.skipped] == [("sgs.res2.width", "sgs.width is set")] and not report.new


# ---------------------------------------------------------------- tests: the programs


@pytest.mark.slow
def test_a_training_starts_from_the_weights_once_and_a_test_never_reads_them(small_videos, tmp_path):
    weights = tmp_path / "zoo.pyth"
    torch.save({"model_state": source_x3d(classes=400).state_dict()}, weights)
    key = f"++model.weights={weights}"
    job = small_job(small_videos, tmp_path / "run", "model=x3d", "optimizer.lr=0.0", "trainer.max_steps=1", "trainer.statistics_clips=0", "trainer.test=false", key)
    outcome = run_tool("train", *job)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("weights from ") == 1 and "head of 400 classes replaced by one of 2" in outcome.out
    trained = checkpoint.load(tmp_path / "run/checkpoints/last.pt")["model"]
    name = "blocks.3.res_blocks.1.branch2.conv_b.weight"
    assert torch.equal(trained[f"{name}"], torch.load(weights)["model_state"][name])
    weights.unlink()
    outcome = run_tool("train", *job)
    assert outcome.code == 0 and "weights from " not in outcome.out, outcome.err
    outcome = run_tool("test", f"checkpoint={tmp_path}/run/checkpoints/best.pt")
    assert outcome.code == 0 and "weights from " not in outcome.out, outcome.err
    outcome = run_tool("test", f"checkpoint={tmp_path}/run/checkpoints/best.pt", key)
    assert outcome.code == 1 and "tools/test.py does not take" in outcome.err and "the weights tested are those of checkpoint=" in outcome.err


@pytest.mark.slow
def test_a_training_starts_from_the_averaged_weights_of_another_run_with_its_own_schedule_and_then_goes_on_from_itself(small_videos, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    options = ("model=x3d", "trainer.epochs=1", "trainer.test=false", "trainer.statistics_clips=0")
    outcome = run_tool("train", *small_job(small_videos, first, *options, "trainer.ema=0.9"))
    assert outcome.code == 0, outcome.err
    source = checkpoint.load(first / "checkpoints/last.pt")
    averages = source["ema"]["averages"]
    assert source["step"] == 2 and any(not torch.equal(value, source["model"][name]) for name, value in averages.items())

    start = [*options, "optimizer.lr=0.0", f"init_from={first}/checkpoints/last.pt"]
    outcome = run_tool("train", *small_job(small_videos, second, *start, "trainer.max_steps=1"))
    assert outcome.code == 0 and outcome.out.count("weights from ") == 1 and "averaged weights" in outcome.out, outcome.err
    begun = checkpoint.load(second / "checkpoints/last.pt")
    assert begun["step"] == 1 and "ema" not in begun
    for name, value in averages.items():
        assert torch.equal(begun["model"][name], value), name

    outcome = run_tool("train", *small_job(small_videos, second, *start))
    assert outcome.code == 0 and "weights from " not in outcome.out, outcome.err
    assert f"init_from is ignored: this run resumes from {second}/checkpoints/last.pt" in outcome.out and "resuming" in outcome.out

    refused = small_job(small_videos, tmp_path / "third", *start[:-1], f"init_from={first}", "++model.weights=other.pth")
    outcome = run_tool("train", *refused)
    assert outcome.code == 1 and f"error: model.weights=other.pth and init_from={first} both say what to start from" in outcome.err
    outcome = run_tool("test", f"checkpoint={first}/checkpoints/best.pt", f"init_from={second}")
    assert outcome.code == 1 and "tools/test.py does not take init_from" in outcome.err


def test_of_a_run_folder_the_best_checkpoint_is_read(small_videos, tmp_path):
    outcome = run_tool("train", *small_job(small_videos, tmp_path / "run", "model=x3d", f"init_from={tmp_path}"))
    assert outcome.code == 1 and outcome.err.strip().splitlines()[-1].startswith(f"error: init_from={tmp_path} is a folder without checkpoints/best.pt")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/best.pt").touch()
    config = OmegaConf.create({"model": {}, "init_from": str(tmp_path)})
    assert weights_given(config)[:2] == ("init_from", tmp_path / "checkpoints/best.pt")


def test_a_file_that_is_not_there_ends_a_training_in_one_line(small_videos, tmp_path):
    outcome = run_tool("train", *small_job(small_videos, tmp_path / "run", "++model.weights=nowhere.pyth"))
    assert outcome.code == 1 and outcome.err.strip().splitlines()[-1].startswith("error: model.weights=nowhere.pyth does not exist")
    assert not (tmp_path / "run").exists()
