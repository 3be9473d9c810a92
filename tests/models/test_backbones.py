"""Every backbone against the library's network that it stands on, and against published costs."""

from __future__ import annotations

from typing import Callable

import pytest
import torch
from backbone_cases import CASES, CLASSES, Case, lively, stages_of
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.squeeze_excitation import SqueezeExcitation
from tiers import slow_but
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import video

from atfr.models.backbones import resnet3d, slowfast
from atfr.models.backbones.slowfast import Fusion, Pathways

WITH_SOURCE = [name for name, case in CASES.items() if case.source]
LIGHT = ("x3d tiny", "x3d XS", "x3d S", "slow R50", "r2plus1d 18", "r3d 18", "mc3 18", "s3d base", "slowfast 4x16-R50", "resnet3d tiny", "resnet3d 18")


def pool_whole_clip(network: nn.Module) -> None:
    """Make the head's window, which the library fixes for one clip size, the whole of a small clip."""
    for module in network.modules():
        if isinstance(module, nn.AvgPool3d):
            whole_time = not isinstance(network, video.S3D)  # whose window is 2 of however many frames

            def fit(pool: nn.AvgPool3d, inputs: tuple[torch.Tensor]) -> None:
                frames, height, width = inputs[0].shape[2:]
                pool.kernel_size = (frames if whole_time else 2, height, width)

            module.register_forward_pre_hook(fit)


def small_clips(case: Case, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, case.frames, case.side, case.side)


def two_pathways(clips: torch.Tensor, alpha: int) -> list[torch.Tensor]:
    """The input of pytorchvideo's SlowFast, by PySlowFast's rule for the frames of the Slow pathway."""
    chosen = torch.linspace(0, clips.shape[2] - 1, clips.shape[2] // alpha).long()
    return [clips[:, :, chosen], clips]


@pytest.mark.parametrize("name", slow_but(WITH_SOURCE, ("x3d tiny", "mc3 18", "s3d base", "slowfast 4x16-R50").__contains__))
def test_the_librarys_weights_load_and_give_its_logits(name):
    case = CASES[name]
    clips = small_clips(case)
    source = case.source()
    pool_whole_clip(source)
    source = lively(source, two_pathways(clips, case.alpha) if case.alpha > 1 else clips)
    with torch.no_grad():
        expected = source(two_pathways(clips, case.alpha) if case.alpha > 1 else clips)
    with torch.device("meta"):  # no initialisation: every value comes from the source
        model = case.build(size=case.size, num_classes=CLASSES)
    model.dense_network.load_state_dict(source.state_dict(), strict=True, assign=True)
    logits = model.eval()(clips)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert list(model.dense_network.state_dict()) == list(source.state_dict())

    model.train()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm3d, nn.Dropout)):
            module.eval()  # three small clips are too few for statistics
    model(clips).square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), parameter_name


@pytest.mark.parametrize("name", ["resnet3d 18", "resnet3d 50"])
def test_the_papers_network_trains_on_clips_of_any_size(name):
    case = CASES[name]
    model = case.build(size=int(case.size), num_classes=CLASSES)  # from the command line it is a number
    for frames, side in ((4, 64), (7, 90)):
        assert model(torch.randn(2, 3, frames, side, side)).shape == (2, CLASSES)
    model = lively(model.dense_network, torch.randn(2, 3, 4, 64, 64))
    model(torch.randn(2, 3, 4, 64, 64)).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_any_frame_size_will_do_and_no_softmax_ends_the_network(name):
    case = CASES[name]
    with torch.device("meta"):
        model = case.build(size=case.size, num_classes=CLASSES, dropout=0.3).eval()
        for frames, height, width in ((case.frames, 64, 96), (case.frames + 2 * case.alpha, 96, 64)):
            assert model(torch.zeros(2, 3, frames, height, width)).shape == (2, CLASSES)
    assert not any(isinstance(module, nn.Softmax) for module in model.modules())
    assert 0.3 in [module.p for module in model.modules() if isinstance(module, nn.Dropout)]


class StopAtTorch(fx.Tracer):
    """Leaf modules are torch's own, convolutions and pools of ours and fvcore's squeeze-excitation; remembers what was called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, (nn.Conv3d, nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, SqueezeExcitation)) or super().is_leaf_module(module, name)

    def call_module(self, module, forward, args, kwargs):
        self.called.add(self.path_of_module(module))
        return super().call_module(module, forward, args, kwargs)


@pytest.mark.parametrize("name", slow_but(CASES, LIGHT.__contains__))
def test_the_network_can_be_traced_and_its_stages_are_called(name):
    case = CASES[name]
    with torch.device("meta"):
        model = case.build(size=case.size, num_classes=CLASSES).eval()
        tracer = StopAtTorch()
        traced = fx.GraphModule(model.dense_network, tracer.trace(model.dense_network))
        assert traced(small_clips(case)).shape == (3, CLASSES)
    stages = stages_of(case)
    for path in stages.values():
        assert all(part in stages for part in path) if isinstance(path, tuple) else path in tracer.called
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            assert {type(stride) for stride in module.stride} == {int}
    functions = {node.target for node in traced.graph.nodes if node.op == "call_function"}
    assert nn.functional.conv3d not in functions and torch.conv3d not in functions  # all are modules


def counted(case: Case, *, frames: int = 0, side: int = 0, batch_norm: int = 0) -> tuple[float, Callable[[str], float]]:
    """GFLOPs of a clip (the published one where not told), all and of the module at a path; on no device.

    `batch_norm` FLOPs are counted for each element that one puts out, in the first figure only.
    """
    frames, side = frames or case.clip[0], side or case.clip[1]
    normalised = 0

    def add(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        nonlocal normalised
        normalised += output.numel()

    with torch.device("meta"):
        network = case.build(size=case.size, num_classes=400).dense_network.eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.register_forward_hook(add)
        with FlopCounterMode(display=False, depth=None) as counter, torch.no_grad():
            network(torch.zeros(1, 3, frames, side, side))
    flops, root = counter.get_flop_counts(), type(network).__name__
    total = counter.get_total_flops() / 2e9 + batch_norm * normalised / 1e9
    return total, lambda path: sum(flops.get(f"{root}.{path}", {}).values()) / 2e9


# Frames, side, and GFLOPs as published in DESIGN's section 3, by PySlowFast (X3D) and by torchvision; X3D-XL's, which
# the paper gives for another size alone, as fvcore counts them.
DENSE = [
    ("x3d XS", 4, 160, 0.60),
    ("x3d S", 13, 160, 1.96),
    ("x3d M", 16, 224, 4.73),
    ("x3d L", 16, 312, 18.37),
    ("x3d XL", 16, 312, 35.84),
    ("slow R50", 8, 256, 54.52),
    ("slowfast 8x8-R50", 32, 256, 65.71),
    ("r2plus1d 18", 16, 112, 40.52),
    ("r3d 18", 16, 112, 40.70),
    ("mc3 18", 16, 112, 43.34),
    ("s3d base", 16, 224, 17.98),
]


@pytest.mark.parametrize("name, frames, side, published", slow_but(DENSE, lambda row: row[0] in ("x3d M", "slow R50", "r3d 18", "s3d base")))
def test_a_dense_clip_costs_the_published_gflops(name, frames, side, published):
    assert counted(CASES[name], frames=frames, side=side)[0] == pytest.approx(published, abs=0.0075)


# The rest of pytorchvideo's table of models holds batch norm at 5 FLOPs an element, which is what
# fvcore counts of a network in training.
DENSE_WITH_BATCH_NORM = [
    ("x3d XS", 182, 0.91),
    ("x3d M", 256, 6.72),
    ("c2d R50", 256, 25.89),
    ("i3d R50", 256, 37.53),
    ("slowfast 4x16-R50", 256, 36.69),
    ("slowfast 8x8-R101", 256, 127.20),
    ("csn R101", 256, 75.62),
    ("r2plus1d R50", 256, 76.45),
]


@pytest.mark.parametrize("name, side, published", slow_but(DENSE_WITH_BATCH_NORM, lambda row: row[0] in ("x3d M", "slowfast 4x16-R50", "r2plus1d R50")))
def test_a_dense_clip_costs_what_pytorchvideo_published(name, side, published):
    assert counted(CASES[name], side=side, batch_norm=5)[0] == pytest.approx(published, abs=0.0075)


# Percent of a dense clip's GFLOPs behind each stage, from DESIGN's section 3.
BEHIND = {
    "x3d S": (97, 78, 59, 23),
    "x3d L": (98, 85, 67, 25),
    "slow R50": (98, 85, 65, 23),
    "slowfast 4x16-R50": (90, 78, 59, 21),
    "slowfast 8x8-R50": (93, 81, 61, 22),
    "resnet3d 18": (87, 85, 66, 40),
    "resnet3d 50": (93, 91, 69, 31),
    "i3d R50": (83, 58, 39, 13),
    "r2plus1d R50": (97, 71, 34, 8),
    "csn R101": (80, 61, 41, 4),
}


@pytest.mark.parametrize("name", slow_but(BEHIND, ("x3d S", "slow R50", "slowfast 4x16-R50", "resnet3d 18", "i3d R50").__contains__))
def test_the_stages_lie_where_their_share_of_the_cost_says(name):
    total, of = counted(CASES[name])
    stages = stages_of(CASES[name])
    before = 0.0
    for stage, percent in zip(("stem", "res2", "res3", "res4"), BEHIND[name]):
        paths = [stages[stage]] if isinstance(stages[stage], str) else [stages[path] for path in stages[stage]]
        if len(paths) == 2:  # there the lateral convolution counts as part of the stage
            paths.append(paths[0].replace("multipathway_blocks.0", "multipathway_fusion"))
        before += sum(of(path) for path in paths)
        assert 100 * (1 - before / total) == pytest.approx(percent, abs=1.2), stage


def test_the_tiny_3dresnet_is_that_of_depth_18_with_half_of_its_channels():
    shapes = {size: {name: p.shape for name, p in resnet3d.resnet3d(size=size, num_classes=8).named_parameters()} for size in ("tiny", "18")}
    assert shapes["tiny"].keys() == shapes["18"].keys()
    for name, shape in shapes["tiny"].items():
        kernel = tuple(shapes["18"][name][2:])
        assert tuple(shape[2:]) == kernel and all(n * 2 == wide or n == wide in (3, 8) for n, wide in zip(shape[:2], shapes["18"][name][:2])), name


@pytest.mark.filterwarnings("ignore:.*:torch.jit.TracerWarning")
@pytest.mark.parametrize("size, fixed, per_bin", [("18", 2.68, 0.485), pytest.param("50", 2.85, 0.895, marks=pytest.mark.slow)])
def test_the_papers_network_costs_what_the_paper_says_with_sgs_after_res2(size, fixed, per_bin):
    network = resnet3d.resnet3d(size=size, num_classes=400).dense_network.eval()
    # Cost goes with the area, and 64 pixels a side are quicker than the paper's 224.
    clip = torch.zeros(1, 3, 32, 64, 64)
    analysis = FlopCountAnalysis(network, clip).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    gflops = {path: flops / 1e9 * 224**2 / 64**2 for path, flops in analysis.by_module().items()}
    assert gflops["blocks.0"] + gflops["blocks.1"] == pytest.approx(fixed, abs=0.005)
    assert sum(gflops[f"blocks.{i}"] for i in (2, 3, 4)) / 32 == pytest.approx(per_bin, abs=0.0005)


# By pytorchvideo's table of models, in millions, and torchvision's of weights; X3D-XL's as counted here, where its paper
# says 11.0.
PARAMETERS = {
    "x3d XS": 3.79,
    "x3d S": 3.79,
    "x3d M": 3.79,
    "x3d L": 6.15,
    "x3d XL": 11.10,
    "slow R50": 32.45,
    "c2d R50": 24.33,
    "i3d R50": 28.04,
    "slowfast 4x16-R50": 34.48,
    "slowfast 8x8-R50": 34.57,
    "slowfast 8x8-R101": 62.83,
    "csn R101": 22.21,
    "r2plus1d R50": 28.11,
    "r2plus1d 18": 31.505325,
    "r3d 18": 33.371472,
    "mc3 18": 11.695440,
    "s3d base": 8.320048,
}


@pytest.mark.parametrize("name", slow_but(PARAMETERS, LIGHT.__contains__))
def test_the_number_of_parameters_is_the_published_one(name):
    with torch.device("meta"):
        model = CASES[name].build(size=CASES[name].size, num_classes=400)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PARAMETERS[name], abs=0.005)


@pytest.mark.parametrize("size, depths", [("18", (2, 2, 2, 2)), ("50", (3, 4, 6, 3))])
def test_the_papers_network_has_the_parameters_of_its_table_of_layers(size, depths):
    total = 3 * 8 * 5 * 7 * 7 + 2 * 8 + 1024 * 400 + 400  # the stem's convolution and norm, the last layer
    before = 8
    for depth, out, inner, kernel in zip(depths, (32, 256, 512, 1024), (8, 64, 128, 256), (3, 1, 1, 3)):
        total += before * out + 2 * out  # the shortcut of a stage's first block
        for _ in range(depth):
            total += before * inner * kernel + inner * inner * 9 + inner * out + 2 * (inner + inner + out)
            before = out
    with torch.device("meta"):
        model = resnet3d.resnet3d(size=size, num_classes=400)
    assert sum(p.numel() for p in model.parameters()) == total == {"18": 4_629_720, "50": 7_533_944}[size]


@pytest.mark.parametrize("build", dict.fromkeys(case.build for case in CASES.values()), ids=lambda build: build.__name__)
def test_an_unknown_size_is_refused_with_the_sizes_there_are(build):
    sizes = [case.size for case in CASES.values() if case.build is build]
    with pytest.raises(ValueError, match=f"model.size='huge' is not a size of {build.__name__}; choose one of .*{sizes[-1]}"):
        build(size="huge", num_classes=CLASSES)


def test_the_slow_pathway_takes_pyslowfasts_frames():
    clip = torch.arange(32.0).view(1, 1, 32, 1, 1)
    slow, fast = Pathways(alpha=4)(clip)
    assert slow.flatten().tolist() == [0, 4, 8, 13, 17, 22, 26, 31] and fast is clip
    assert Pathways(alpha=8)(clip)[0].flatten().tolist() == [0, 10, 20, 31]


def test_slowfast_refuses_clips_and_fusions_that_do_not_fit():
    with torch.device("meta"):
        model = slowfast.slowfast(size="8x8-R50", num_classes=CLASSES, fusion="released")
        assert {module.rule for module in model.modules() if isinstance(module, Fusion)} == {"released"}
        with pytest.raises(ValueError, match="multiple of 4 frames, not of 10"):
            model(torch.zeros(1, 3, 10, 64, 64))
        with pytest.raises(ValueError, match="model.fusion='sum' .* released, aligned"):
            slowfast.slowfast(size="8x8-R50", num_classes=CLASSES, fusion="sum")
