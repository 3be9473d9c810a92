"""What was exported, loaded from its file, gives the network's own logits and B' on clips of different B'."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from backbone_cases import lively
from outcomes import run
from run_tools import run_tool, small_job
from tiers import slow_but
from torch import nn

from atfr.models import export
from atfr.models.backbones import resnets, slowfast, torchvision3d, x3d
from atfr.models.sgs.config import SGSConfig
from atfr.models.video_net import VideoNet

ATFR = SGSConfig.from_preset("atfr", width=0.5)
REFERENCE = SGSConfig.from_preset("reference")
WITHOUT_ONNX = [name for name in export.ONNX_PACKAGES if importlib.util.find_spec(name) is None]
FORMATS = ["torch_export", "onnx"]


def small(**options: object) -> VideoNet:
    """Two convolutions, the second striding along time, and SGS between them."""
    layers = (nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 8, 3, stride=2, padding=1), nn.ReLU())
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 5))
    return VideoNet(network, stages={}, sgs=SGSConfig.from_preset("reference", after="0", **options))


def clips(frames: int, side: int) -> dict[str, torch.Tensor]:
    """Noise, which changes with every frame, and the same with some of its frames held."""
    x = torch.randn(1, 3, frames, side, side)
    held = {f"held {hold}": x[:, :, torch.arange(frames) // hold * hold] for hold in (2, 3, 5)}
    calm = torch.arange(frames).clamp(min=frames // 2)
    return {"noise": x, **held, "at rest, then not": x[:, :, calm]}


def need(format: str) -> None:
    if format == "onnx" and WITHOUT_ONNX:
        pytest.skip(f"not installed: {', '.join(WITHOUT_ONNX)}")


def check(model: VideoNet, samples: dict[str, torch.Tensor], path, format: str, *, different: bool = True) -> None:
    need(format)
    run = export.export(model, samples["noise"], path / export.FILES[format], format=format)
    rows = export.compare(model, run, samples)
    assert all(row.equal for row in rows), export.as_table(rows)
    assert len({row.bins for row in rows}) > 1 or not different, export.as_table(rows)


@torch.no_grad()
def find_width(model: VideoNet, samples: dict[str, torch.Tensor]) -> None:
    """The width with which the samples keep the most different numbers of features."""

    def kinds(width: float) -> int:
        for layer in model.sgs.values():
            layer.width.fill_(width)
        return len({run(model.eval(), x).bins[0] for x in samples.values()})

    kinds(max((0.02, 0.05, 0.1, 0.2, 0.4, 0.8), key=kinds))


@pytest.mark.slow
@pytest.mark.parametrize(
    "sgs, format",
    [(ATFR, "torch_export"), (ATFR, "onnx"), (replace(ATFR, embed_from="features", after="res2"), "onnx"), (REFERENCE, "onnx"), (SGSConfig.from_preset("glance"), "onnx")],
    ids=["atfr, torch_export", "atfr, onnx", "embeds features", "reference", "glance"],
)
def test_x3d(sgs, format, tmp_path):
    model, samples = x3d.x3d(size="tiny", num_classes=5, sgs=sgs), clips(12, 32)
    lively(model.dense_network, samples["noise"])
    if sgs is not REFERENCE:
        find_width(model, samples)
    check(model, samples, tmp_path, format)


@pytest.mark.slow
@pytest.mark.parametrize(
    "build,size,frames,format",
    [(resnets.i3d, "R50", 12, "torch_export"), (torchvision3d.s3d, "base", 24, "onnx")],
    ids=["i3d", "s3d"],
)
def test_trunks_that_stride_along_time(build, size, frames, format, tmp_path):
    model, samples = build(size=size, num_classes=5, sgs=ATFR), clips(frames, 64)
    lively(model.dense_network, samples["noise"])
    find_width(model, samples)
    check(model, samples, tmp_path, format)


@pytest.mark.slow
@pytest.mark.parametrize("fusion,format", [("aligned", "onnx"), ("released", "torch_export")], ids=slowfast.FUSION_RULES[::-1])
def test_a_layer_in_each_pathway_of_a_slowfast(fusion, format, tmp_path):
    model, samples = slowfast.slowfast(size="8x8-R50", num_classes=5, fusion=fusion, sgs=ATFR), clips(16, 64)
    lively(model.dense_network, samples["noise"])
    find_width(model, samples)
    check(model, samples, tmp_path, format)


@pytest.mark.parametrize("format", FORMATS)
def test_a_dense_network_says_how_many_frames_there_are(format, tmp_path):
    check(VideoNet(small().dense_network, stages={}, sgs=None), clips(6, 16), tmp_path, format, different=False)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_features_of_a_size_that_the_grid_does_not_divide(format, tmp_path):
    samples = clips(12, 18)
    model = small(similarity="anchor", kernel="mean", scale="absolute", order="time", embedding="pooled", width=0.5)
    find_width(model, samples)
    check(model, samples, tmp_path, format)


LAYERS = (
    {"similarity": "path", "embedding": "pooled", "scale": "absolute", "width": 0.7, "kernel": "mean", "noise_floor": True},
    {"similarity": "path", "edges": "inclusive", "metric": "cosine"},
    {"similarity": "partition", "embedding": "pooled", "scale": "absolute", "width": 0.3, "kernel": "middle", "order": "time", "time_embedding": True},
    {"similarity": "partition", "embedding": "pooled", "scale": "absolute", "kernel": "mean", "order": "time", "num_bins": 5, "same_number": True},
    {"metric": "mahalanobis"},
    {"metric": "l1", "kernel": "delta_normalized", "order": "time", "embedding": "frozen"},
    {"similarity": "uniform", "kernel": "mean", "num_bins": 4},
    {"similarity": "none", "kernel": "mean"},
    {"execution": "bucketed"},
)


@pytest.mark.parametrize("options", slow_but(LAYERS, lambda options: options.get("similarity") in ("partition", "uniform")), ids=str)
def test_every_choice_of_the_layer(options, tmp_path):
    model = small(**options)
    if options.get("noise_floor"):
        model.sgs["0"].floor.fill_(0.1)
    if options.get("time_embedding"):
        nn.init.normal_(model.sgs["0"].time.linear.weight)
    check(model, clips(12, 16), tmp_path, "torch_export", different=not model.sgs["0"].options.has_fixed_cost)


def test_a_clip_that_holds_a_nan_gives_nan(tmp_path):
    model, clip = small(), torch.randn(1, 3, 6, 16, 16)
    run = export.export(model, clip, tmp_path / "model.pt2", format="torch_export")
    clip[0, 0, 3] = torch.nan
    assert run(clip)[0].isnan().all()


def test_what_cannot_be_exported_is_named(tmp_path, monkeypatch):
    def error(model: VideoNet | None, format: str = "torch_export") -> str:
        with pytest.raises(ValueError) as caught:
            export.export(model or small(), torch.randn(1, 3, 6, 16, 16), tmp_path / "file", format=format)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "format='jit' does not exist; choose one of onnx, torch_export" in error(None, "jit")
    following = VideoNet(small().dense_network, stages={}, sgs=SGSConfig.from_preset("reference", after=("0", "3")))
    assert "SGS layers follow each other cannot be exported: 3 samples features that were sampled before" in error(following)
    assert "SGS after '0' is not calibrated" in error(small(similarity="anchor", kernel="mean", scale="absolute", embedding="pooled"))
    assert "similarity=random cannot be exported" in error(small(similarity="random", kernel="mean", num_bins=3))
    if not WITHOUT_ONNX:
        assert "metric=mahalanobis, kernel=linear, embedding=mlp) as onnx: No ONNX function found" in error(small(metric="mahalanobis"), "onnx")
    monkeypatch.setattr(export, "ONNX_PACKAGES", ("onnx_of_nobody",))
    assert error(None, "onnx") == 'format=onnx needs onnx_of_nobody: pip install -e ".[onnx]", or take format=torch_export'


@pytest.fixture(scope="module")
def trained(small_videos, tmp_path_factory):
    """The run folder of a job of one step, in which B' differs between clips."""
    folder = tmp_path_factory.mktemp("run")
    spread = ["model.sgs.after=res2", "model.sgs.embed_from=features", "model.sgs.keep_ratio=0.5"]
    outcome = run_tool("train", *small_job(small_videos, folder, "trainer.max_steps=1", "trainer.test=false", *spread))
    assert outcome.code == 0, outcome.err
    return folder


@pytest.mark.parametrize("format", FORMATS)
def test_the_command_exports_a_checkpoint_and_checks_it_on_real_clips(trained, format):
    need(format)
    outcome = run_tool("export", f"checkpoint={trained}/checkpoints/last.pt", f"format={format}", "dataset.clip.views=3")
    assert outcome.code == 0, outcome.err
    file = trained / "export" / export.FILES[format]
    assert file.is_file() and not list(file.parent.glob("unchecked*"))
    heading, *rows, where, _ = outcome.out.strip().splitlines()
    assert heading.split()[0] == "clip" and f"exported to {file}" in where
    pairs = [row.split()[-3:-1] for row in rows]
    assert len(rows) >= 5 and all(own == exported for own, exported in pairs) and len({own for own, _ in pairs}) > 1
    assert any("each frame held for 2" in row for row in rows)


@pytest.mark.slow
def test_the_file_needs_nothing_of_ours(trained, tmp_path):
    outcome = run_tool("export", f"checkpoint={trained}/checkpoints/last.pt", f"trainer.output_dir={tmp_path}")
    assert outcome.code == 0, outcome.err
    code = (
        "import sys, torch; net = torch.export.load(sys.argv[1]).module(); logits, bins = net(torch.randn(1, 3, 8, 32, 32));"
        " assert logits.shape == (1, 2) and 1 <= bins.item() <= 8 and 'atfr' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "export/model.pt2")], check=True, cwd=tmp_path)


@pytest.mark.slow
def test_an_export_that_differs_is_an_error_and_replaces_nothing(trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "export").mkdir()
    (tmp_path / "export/model.pt2").write_text("of yesterday")
    monkeypatch.setattr(export, "TOLERANCE", -1)
    outcome = run_tool("export", f"checkpoint={tmp_path}/checkpoints/last.pt")
    assert outcome.code == 1 and "error: what was exported differs from the network for" in outcome.err and "DIFFERS" in outcome.out
    assert (tmp_path / "export/model.pt2").read_text() == "of yesterday" and (tmp_path / "export/unchecked.pt2").is_file()


def test_what_a_user_can_mend_ends_in_one_line(trained, small_videos, tmp_path):
    last = f"checkpoint={trained}/checkpoints/last.pt"
    for arguments, message in (
        ([last, "format=tflite"], "format='tflite' does not exist; choose one of onnx, torch_export"),
        (["checkpoint=nowhere.pt"], "checkpoint nowhere.pt does not exist"),
        ([last, "~model.sgs"], "tools/export.py does not take ~model.sgs"),
        ([last, "model.size=XS"], "is of another model"),
    ):
        outcome = run_tool("export", *arguments)
        assert outcome.code == 1 and outcome.err.strip().splitlines()[-1].startswith("error: ") and message in outcome.err, outcome.err
