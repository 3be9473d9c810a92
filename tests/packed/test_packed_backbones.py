"""Packed execution of every backbone: a clip in a batch, a clip alone, and the plain network on what the clip keeps."""

from __future__ import annotations

import copy
import functools
import logging
import random
from dataclasses import replace
from typing import Callable, NamedTuple

import pytest
import torch
from backbone_cases import CASES, CLASSES, stages_of
from outcomes import Outcome, run
from placed_backbones import ATFR, NETS, backbone, built, calibrated, check_alone_and_in_batches, clips_for, close, placed
from tiers import slow_but
from torch import Tensor, nn
from toy_network import Toy
from uneven_clips import uneven_clips

from atfr.models.backbones.slowfast import FUSION_RULES, SIZES, Fusion
from atfr.models.packed.ops import conv3d
from atfr.models.packed.segments import Segments
from atfr.models.sgs.config import SGSConfig
from atfr.models.video_net import VideoNet

REFERENCE = SGSConfig.from_preset("reference")
# (name, location, fusion rule); the rule only matters to a SlowFast
PLACED = [
    (name, location, rule)
    for name, net in NETS.items()
    for location in (*net.locations, net.block)
    for rule in (FUSION_RULES if name.startswith("slowfast") else ("aligned",))
]


def in_words(value: object) -> str:
    """Of a test's parameters."""
    return value if isinstance(value, str) else " ".join(map(in_words, value))


def paths_of(name: str, location: str | tuple[str, ...]) -> dict[str, str]:
    """{layer: path of the module that it samples}, as `model.sgs.after` has it."""
    stages, paths = stages_of(CASES[name]), {}
    for part in (location,) if isinstance(location, str) else location:
        target = stages.get(part, part)
        paths |= {part: target} if isinstance(target, str) else {t: stages[t] for t in target}
    return paths


def average(x: Tensor, dim: int, bins: int) -> Tensor:
    """Means of as many contiguous groups of equal size (+-1) as there are bins."""
    length = x.shape[dim]
    groups = [[t for t in range(length) if t * bins // length == b] for b in range(bins)]
    return torch.stack([x.index_select(dim, torch.tensor(group)).mean(dim) for group in groups], dim)


def lateral(fusion: Fusion, fast: Tensor) -> Tensor:
    return fusion.activation(fusion.norm(fusion.conv_fast_to_slow(fast)))


def released(fusion: Fusion, slow: Tensor, fast: Tensor, slow_times: Tensor, fast_times: Tensor) -> Tensor:
    """One clip: the shorter of Slow and lateral features gets zeros on both sides, the odd one behind."""
    fused = lateral(fusion, fast)
    longest = max(slow.shape[2], fused.shape[2])
    parts = []
    for x in (slow, fused):
        missing = longest - x.shape[2]
        front = missing // 2
        parts.append(nn.functional.pad(x, (0, 0, 0, 0, front, missing - front)))
    return torch.cat(parts, dim=1)


def aligned(fusion: Fusion, slow: Tensor, fast: Tensor, slow_times: Tensor, fast_times: Tensor) -> Tensor:
    """One clip: for each Slow feature, the convolution centred on the Fast feature nearest in time."""
    conv = fusion.conv_fast_to_slow
    kernel, alpha = conv.kernel_size[0], conv.stride[0]
    fused = []
    for time in slow_times.tolist():
        distances = [abs(alpha * time - t) for t in fast_times.tolist()]
        centre = distances.index(min(distances))
        window = torch.zeros(1, fast.shape[1], kernel, *fast.shape[3:], dtype=fast.dtype)
        for k in range(kernel):
            if 0 <= centre + k - kernel // 2 < fast.shape[2]:
                window[:, :, k] = fast[:, :, centre + k - kernel // 2]
        fused.append(nn.functional.conv3d(window, conv.weight))
    return torch.cat((slow, fusion.activation(fusion.norm(torch.cat(fused, dim=2)))), dim=1)


RULES = {"released": released, "aligned": aligned}


class Kept(NamedTuple):
    """The plain network on what a clip keeps."""

    logits: Tensor
    bins: tuple[int, ...]  # of each layer
    inputs: dict[str, Tensor]  # of the modules asked for


def on_what_is_kept(net: VideoNet, paths: dict[str, str], clip: Tensor, choose: Callable[[str, int], int], watch: tuple[str, ...] = ()) -> Kept:
    """The original network, layer by layer, on one clip whose features are averaged behind `paths`.

    Neither torch.fx nor anything packed is in it: hooks average the modules' outputs, and a SlowFast's
    fusion is the rule as it is described. `choose` gives a layer's B' from what there is.
    """
    kept, inputs, handles = {}, {}, []
    times: dict[str, Tensor] = {}  # of a SlowFast's pathways, by their number in the modules' paths

    def sample(layer: str, path: str, output: Tensor) -> Tensor:
        kept[layer] = choose(layer, output.shape[2])
        pathway = path.split("multipathway_blocks.")[-1][0]
        before = times.get(pathway, torch.arange(float(output.shape[2])))
        if len(before) == output.shape[2]:
            times[pathway] = average(before, 0, kept[layer])
        return average(output, 2, kept[layer])

    def fuse(fusion: Fusion, slow: Tensor, fast: Tensor) -> Tensor:
        slow_times, fast_times = (times.get(p, torch.arange(float(x.shape[2]))) for p, x in (("0", slow), ("1", fast)))
        return RULES[fusion.rule](fusion, slow, fast, slow_times, fast_times)

    for layer, path in paths.items():
        hook = lambda module, args, output, layer=layer, path=path: sample(layer, path, output)  # noqa: E731
        handles.append(net.dense_network.get_submodule(path).register_forward_hook(hook))
    for path in watch:
        hook = lambda module, args, path=path: inputs.update({path: args[0].detach().clone()})  # noqa: E731
        handles.append(net.dense_network.get_submodule(path).register_forward_pre_hook(hook))
    fusions = [module for module in net.dense_network.modules() if isinstance(module, Fusion)]
    for fusion in fusions:
        fusion.forward = functools.partial(fuse, fusion)
    try:
        logits = net.dense_network(clip[None])
    finally:
        for handle in handles:
            handle.remove()
        for fusion in fusions:
            del fusion.forward
    return Kept(logits[0], tuple(kept[layer] for layer in paths), inputs)


def least(net: VideoNet, layer: str) -> int:
    return net.sgs[layer.replace(".", "_")].min_bins


def uneven(net: VideoNet, clip: int) -> Callable[[str, int], int]:
    """B' of a clip: as few as possible for the first, all for the second, anything for others."""

    def choose(layer: str, given: int) -> int:
        fewest = least(net, layer)
        return (fewest, given)[clip] if clip < 2 else random.randint(fewest, given)

    return choose


def forced_of(kept: list[Kept]) -> list[tuple[int, ...]]:
    """For each layer the B' of each clip."""
    return list(zip(*(k.bins for k in kept)))


class Placed(NamedTuple):
    name: str
    net: VideoNet
    paths: dict[str, str]


QUICK = {  # one location or two in each kind of network
    "x3d tiny": ("stem", "res2"),
    "r2plus1d 18": ("res2",),
    "mc3 18": ("res2",),
    "s3d base": ("stem",),
    "resnet3d tiny": ("res2", ("stem", "res4")),
    "slowfast 8x8-R50": (("slow.res2", "fast.res3"),),
}


def is_quick(place: tuple) -> bool:
    """Whether a place is tried in the main tier."""
    name, location, rule = place
    return location in QUICK.get(name, ()) and rule == "aligned"


@pytest.fixture(scope="module", params=[place if is_quick(place) else pytest.param(place, marks=pytest.mark.slow) for place in PLACED], ids=in_words)
def at(request) -> Placed:
    """A network with SGS somewhere; of module scope, so that its tests run one after the other."""
    name, location, rule = request.param
    return Placed(name, built(name, location, rule), paths_of(name, location))


def test_a_clip_in_a_batch_and_alone_is_the_plain_network_on_what_the_clip_keeps(at):
    net, clips = at.net, clips_for(at.name, 4)
    with torch.no_grad():
        kept = [on_what_is_kept(net, at.paths, clip, uneven(net, i)) for i, clip in enumerate(clips)]
        expected, forced = torch.stack([k.logits for k in kept]), forced_of(kept)
        assert all(len(set(lengths)) > 1 for lengths in forced)
        assert expected.std() > 0.1
        batch = run(net, clips, forced)
        assert batch.bins == [k.bins for k in kept]
        close(batch.logits, expected)
        some = random.sample(range(4), 2)
        close(net(clips[some], [[lengths[i] for i in some] for lengths in forced]), expected[some])
        i = random.randrange(4)
        close(net(clips[i : i + 1], [[lengths[i]] for lengths in forced]), expected[i : i + 1])


@pytest.mark.slow
def test_where_all_is_kept_the_network_is_the_dense_one(at):
    clips = clips_for(at.name, 2)
    given: dict[str, int] = {}
    with torch.no_grad():
        on_what_is_kept(at.net, at.paths, clips[0], lambda layer, there: given.setdefault(layer, there))
        prediction = run(at.net, clips, [(given[layer],) * 2 for layer in at.paths])
        assert prediction.frames == tuple(given[layer] for layer in at.paths)
        close(prediction.logits, at.net.dense_network(clips), 5e-5)


CHOOSING = [(name, "slow.res2" if name == "slowfast 4x16-R50" else "res2", "aligned") for name in NETS] + [
    ("x3d tiny", ("res2", "res4"), "aligned"),
    ("s3d base", "stem", "aligned"),
    ("slowfast 8x8-R50", ("res2", "res4"), "released"),
    ("slowfast 8x8-R50", ("slow.res2", "fast.res3"), "aligned"),
]


@pytest.mark.parametrize("name, location, rule", slow_but(CHOOSING, is_quick), ids=in_words)
def test_a_clip_that_chooses_what_it_keeps_is_the_same_alone_and_in_any_batch(name, location, rule):
    net, clips = built(name, location, rule), clips_for(name, 5)
    with torch.no_grad():
        calibrated(net, clips)
    check_alone_and_in_batches(net, clips)


RANDOM = ["x3d S", "slow R50", "i3d R50", "r2plus1d 18", "mc3 18", "resnet3d 18", "slowfast 8x8-R50"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("sgs", [ATFR, REFERENCE], ids=["atfr", "reference"])
def test_a_clip_is_the_same_alone_and_in_many_random_batches(name, sgs):
    # The reference's clips change at least once: where all is noise, it magnifies that of the convolutions, too.
    net, clips = built(name, "res2", sgs=sgs), clips_for(name, 10, 1 if sgs is ATFR else 2)
    with torch.no_grad():
        if sgs is ATFR:
            calibrated(net, clips)
    check_alone_and_in_batches(net, clips, batches=30, most=4)


@pytest.mark.parametrize("name", ["x3d tiny", "slow R50", "i3d R50", "r2plus1d 18", "slowfast 8x8-R50"])
@pytest.mark.slow
def test_the_reference_gives_a_clip_the_same_logits_alone_and_in_any_batch(name):
    net = built(name, "res2", "released", REFERENCE)
    check_alone_and_in_batches(net, clips_for(name, 5, least=2))


@pytest.mark.parametrize("name", ["x3d tiny", "resnet3d tiny", "i3d R50", "r2plus1d 18"])
@pytest.mark.slow
def test_sampled_at_the_input_a_network_sees_the_averaged_frames_as_its_clip(name):
    net, clips = placed(name, "input"), clips_for(name, 3)
    net.sgs["input"].width.fill_(0.5)
    found = run(net, clips)
    weights = found.layers[0].weights
    for clip, row, kept, summed in zip(clips, found.logits, found.layers[0].segments.lengths, weights):
        merged = torch.einsum("bt,cthw->cbhw", summed[:kept], clip)
        assert torch.allclose(net.dense_network(merged[None])[0], row, atol=1e-3)
    forced = run(net, clips, [(8, 5, 6) if name != "i3d R50" else (8, 6, 7)])
    for clip, row, bins in zip(clips, forced.logits, forced.layers[0].segments.lengths):
        assert torch.allclose(net.dense_network(average(clip, 1, bins)[None])[0], row, atol=1e-3)


@pytest.mark.parametrize("name, stage, activation", [("x3d tiny", "res2", "blocks.1.res_blocks.{}.activation"), pytest.param("r3d 18", "res3", "layer2.{}.relu", marks=pytest.mark.slow)])
def test_features_before_an_activation_are_sampled_before_it(name, stage, activation):
    options = replace(ATFR, after=stage, before_activation=True)
    net = VideoNet(backbone(name), stages=stages_of(CASES[name]), sgs=options, probe=NETS[name].probe).eval()
    last = max(int(path.split(".")[-2]) for path, _ in net.dense_network.named_modules() if path in {activation.format(i) for i in range(9)})
    clips = clips_for(name, 3)
    frames = NETS[name].frames // (2 if name == "r3d 18" else 1)  # whose res3 halves them
    forced, expected = (1, frames, frames // 2), []

    def sample(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (average(inputs[0], 2, forced[len(expected)]),)

    handle = net.dense_network.get_submodule(activation.format(last)).register_forward_pre_hook(sample)
    with torch.no_grad():
        for clip in clips:
            expected.append(net.dense_network(clip[None])[0])
        handle.remove()
        close(net(clips, [forced]), torch.stack(expected))


GRADIENTS = [
    ("x3d tiny", ("res2", "res4"), "aligned"),
    ("r2plus1d 18", "res2", "aligned"),
    ("i3d R50", "res2", "aligned"),
    ("s3d base", "res2", "aligned"),
    ("slowfast 8x8-R50", "res2", "aligned"),
    ("slowfast 8x8-R50", "res2", "released"),
    *((name, "res2", "aligned") for name in ("slow R50", "c2d R50", "csn R101", "r3d 18", "mc3 18", "resnet3d 18")),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, location, rule", GRADIENTS, ids=in_words)
def test_gradients_of_a_batch_are_the_sum_of_those_of_its_clips(name, location, rule):
    net, paths = copy.deepcopy(built(name, location, rule)).double(), paths_of(name, location)
    clips = clips_for(name, 3).double()
    with torch.no_grad():
        forced = forced_of([on_what_is_kept(net, paths, clip, uneven(net, i)) for i, clip in enumerate(clips)])
    net(clips, forced).square().sum().backward()
    batched = {key: p.grad for key, p in net.named_parameters()}
    net.zero_grad(set_to_none=True)
    for i, clip in enumerate(clips):
        net(clip[None], [[lengths[i]] for lengths in forced]).square().sum().backward()
    for key, parameter in net.named_parameters():
        assert (parameter.grad is None) == (batched[key] is None) == key.startswith("sgs.")
        if parameter.grad is not None:
            error = (batched[key] - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-9)
            assert error < 1e-6, (key, error)


STATISTICS = [
    ("x3d tiny", "res2", ("blocks.2.res_blocks.0.branch2.norm_b.0", "blocks.4.res_blocks.0.branch1_norm", "blocks.5.pool.pre_norm")),
    ("r2plus1d 18", "res2", ("layer2.0.conv1.0.1", "layer3.0.downsample.1", "layer4.1.conv2.1")),
    ("i3d R50", "res2", ("blocks.3.res_blocks.0.branch2.norm_a", "blocks.5.res_blocks.2.branch2.norm_c")),
    ("s3d base", "res2", ("features.5.branch1.1.1.1", "features.15.branch3.1.1")),
    ("slowfast 8x8-R50", "res2", ("blocks.1.multipathway_fusion.norm", "blocks.4.multipathway_blocks.0.res_blocks.2.branch2.norm_c")),
    pytest.param("slow R50", "res2", ("blocks.2.res_blocks.0.branch2.norm_a", "blocks.4.res_blocks.2.branch2.norm_c"), marks=pytest.mark.slow),
    ("c2d R50", "res2", ("blocks.3.res_blocks.0.branch2.norm_a", "blocks.5.res_blocks.2.branch2.norm_c")),
    ("csn R101", "res2", ("blocks.2.res_blocks.0.branch2.norm_b", "blocks.4.res_blocks.2.branch2.norm_c")),
    pytest.param("r3d 18", "res2", ("layer2.0.conv1.1", "layer3.0.downsample.1", "layer4.1.conv2.1"), marks=pytest.mark.slow),
    ("mc3 18", "res2", ("layer2.0.conv1.1", "layer3.0.downsample.1", "layer4.1.conv2.1")),
    ("resnet3d 18", "res2", ("blocks.2.res_blocks.0.branch2.norm_a", "blocks.4.res_blocks.1.branch2.norm_c")),
]


@pytest.mark.parametrize("name, location, norms", STATISTICS, ids=in_words)
@pytest.mark.slow
def test_training_statistics_of_batch_norm_are_those_of_the_features_that_clips_keep(name, location, norms):
    net, paths = copy.deepcopy(built(name, location)), paths_of(name, location)
    clips = clips_for(name, 3)
    with torch.no_grad():
        kept = [on_what_is_kept(net, paths, clip, uneven(net, i), watch=norms) for i, clip in enumerate(clips)]
        assert all(len(set(lengths)) > 1 for lengths in forced_of(kept))
        for path in norms:
            norm = net.dense_network.get_submodule(path)
            before = copy.deepcopy(norm.state_dict())
            norm.train()
            norm.momentum = 1.0
            net(clips, forced_of(kept))
            features = torch.cat([k.inputs[path][0].flatten(1) for k in kept], dim=1)  # [C, all features]
            spread = features.std()
            close(norm.running_mean / spread, features.mean(dim=1) / spread)
            close(norm.running_var / spread**2, features.var(dim=1) / spread**2)
            norm.eval()
            norm.load_state_dict(before)


@pytest.mark.parametrize("name", slow_but(NETS, QUICK.__contains__))
def test_sgs_leaves_the_names_of_the_backbones_parameters_unchanged(name):
    case = CASES[name]
    with torch.device("meta"):
        dense = case.build(size=case.size, num_classes=CLASSES).state_dict()
        sampled = case.build(size=case.size, num_classes=CLASSES, sgs=replace(ATFR, after=["res2", "res4"]))
    assert [key for key in sampled.state_dict() if not key.startswith("sgs.")] == list(dense)
    assert sampled.execution == "packed"


LEAST = {
    ("i3d R50", "stem"): 2, ("i3d R50", "res2"): 2,
    ("c2d R50", "res2"): 2, ("c2d R50", "res4"): 1,
    ("s3d base", "stem"): 7, ("s3d base", "res3"): 7, ("s3d base", "res4"): 4,
    ("r2plus1d R50", "res2"): 1, ("r2plus1d 18", "res2"): 1, ("csn R101", "res2"): 1,
}  # fmt: skip


@pytest.mark.parametrize("name, location", LEAST, ids=str)
@pytest.mark.slow
def test_a_static_clip_keeps_as_few_features_as_the_rest_can_run_on(name, location):
    net, paths = built(name, location), paths_of(name, location)
    fewest = least(net, location)
    assert fewest == LEAST[name, location]
    clips = clips_for(name, 3)
    clips[1] = clips[1, :, :1]
    with torch.no_grad():
        if fewest > 1:
            with pytest.raises(RuntimeError):
                on_what_is_kept(net, paths, clips[0], lambda *_: fewest - 1)
        net.sgs[location].width.fill_(1e3)  # nothing changes as much
        alone, batch = [run(net, clip[None]) for clip in clips], run(net, clips)
        assert batch.bins == [(fewest,)] * 3
        close(batch.logits, torch.cat([a.logits for a in alone]))
        assert batch.logits.isfinite().all()
        frames = batch.frames[0]  # and beside clips that keep more
        uneven = run(net, clips, [(frames, fewest, (fewest + frames) // 2)])
        close(uneven.logits[1:2], net(clips[1:2], [(fewest,)]))


def test_a_location_inside_a_residual_branch_is_refused():
    with pytest.raises(ValueError, match="SGS cannot be put behind .*conv_a: .* also needs .* from before it, which keeps all frames"):
        VideoNet(backbone("x3d tiny"), stages={}, sgs=replace(ATFR, after="blocks.2.res_blocks.1.branch2.conv_a"))


# Networks that packing does not know, or knows wrongly.


class Shuffle(nn.Module):
    """Something of one's own: the mean of the frames before this one."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(2)


class Leaky(nn.Module):
    """Claims a packed form, in which clips see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def packed_forward(self, pair: tuple[Tensor, Segments]) -> tuple[Tensor, Segments]:
        return self.conv(pair[0]), pair[1]


class Tight(Leaky):
    def packed_forward(self, pair: tuple[Tensor, Segments]) -> tuple[Tensor, Segments]:
        return conv3d(self.conv, *pair), pair[1]


class Overall(Leaky):
    """Another leak: a mean over the whole batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(dim=(2, 3, 4), keepdim=True)

    def packed_forward(self, pair: tuple[Tensor, Segments]) -> tuple[Tensor, Segments]:
        return pair[0] + pair[0].mean(dim=(2, 3, 4), keepdim=True), pair[1]


def toy(second: nn.Module, norm: bool = False, **options: object) -> VideoNet:
    network = Toy(nn.Sequential(second, nn.Conv3d(8, 8, 3, padding=1), *([nn.BatchNorm3d(8)] if norm else [])))
    sgs = SGSConfig.from_preset("atfr", **{"after": "first", "width": 0.5, **options})
    return VideoNet(network, stages={"first": "first", "second": "second.0"}, sgs=sgs, probe=(8, 8, 8)).eval()


def check_forced(net: VideoNet, bins: tuple[int, ...] = (3, 8, 1, 3, 5), tolerance: float = 1e-5) -> Outcome:
    clips = torch.randn(len(bins), 3, 8, 8, 8)
    with torch.no_grad():
        batch = run(net, clips, [bins])
        assert batch.bins == [(b,) for b in bins]
        alone = torch.cat([on_what_is_kept(net, {"first": "first"}, clip, lambda *_: b).logits[None] for clip, b in zip(clips, bins)])
        close(batch.logits / alone.std(), alone / alone.std(), tolerance)
    return batch


def test_a_network_with_an_unknown_module_runs_bucketed_and_says_why(caplog):
    with caplog.at_level(logging.WARNING):
        net = toy(Shuffle())
    assert net.execution == "bucketed"
    assert "cumsum" in caplog.text and "no packed form" in caplog.text and "runs bucketed" in caplog.text
    check_forced(net)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        net = toy(nn.GroupNorm(2, 8))
    assert net.execution == "bucketed" and "second.0 behind SGS has no packed form: GroupNorm" in caplog.text
    check_forced(net)
    with torch.no_grad():  # and where clips choose
        clips = uneven_clips(6, 8, 8)
        net.sgs["first"].width.fill_(0.5)
        batch = run(net, clips)
        assert len(set(batch.bins)) > 1
        close(batch.logits, torch.cat([net(clip[None]) for clip in clips]), 1e-5)


class ByName(nn.Module):
    """Gives a module with a packed form of its own its input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.own = Tight()

    def forward(self, x: Tensor) -> Tensor:
        return self.own(x=x)


def test_a_packed_form_of_its_own_that_is_called_by_keyword_is_refused_by_name():
    with pytest.raises(ValueError, match=r"second\.0\.own behind SGS.*by position, not as x"):
        toy(ByName(), execution="packed")


def test_bucketed_execution_refuses_batch_norm_that_is_trained():
    net = toy(nn.ReLU(), norm=True, execution="bucketed")
    assert net.execution == "bucketed"
    check_forced(net)
    net.train()
    with pytest.raises(ValueError, match="statistics of one bucket after the other: freeze it"):
        net(torch.randn(2, 3, 8, 8, 8), [(1, 4)])
    for module in net.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.eval()
    net(torch.randn(2, 3, 8, 8, 8), [(1, 4)]).sum().backward()
    assert net.dense_network.first.weight.grad.isfinite().all()


@pytest.mark.parametrize("name, location, sgs", [pytest.param("r2plus1d 18", "res2", ATFR, marks=pytest.mark.slow), pytest.param("i3d R50", "stem", ATFR, marks=pytest.mark.slow), ("x3d tiny", "res3", REFERENCE)])
def test_bucketed_and_packed_execution_agree(name, location, sgs):
    nets = []
    for execution in ("packed", "bucketed"):
        torch.manual_seed(1)
        options = replace(sgs, after=location, execution=execution)
        nets.append(VideoNet(backbone(name), stages=stages_of(CASES[name]), sgs=options, probe=NETS[name].probe).eval())
    assert [net.execution for net in nets] == ["packed", "bucketed"]
    frames = NETS[name].frames
    with torch.no_grad():
        clips = clips_for(name, 4)
        forced = [(frames, 2, frames // 2, 2)]
        close(nets[0](clips, forced), nets[1](clips, forced))


def test_packed_execution_that_is_asked_for_is_refused_by_name():
    with pytest.raises(ValueError, match="second.0 behind SGS has no packed form: GroupNorm may mix"):
        toy(nn.GroupNorm(2, 8), execution="packed")
    with pytest.raises(ValueError, match=r"'cumsum' \(cumsum\) behind SGS has no packed form"):
        toy(Shuffle(), execution="packed")


class Standardised(nn.Conv3d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight / weight.norm(), bias)


def test_a_convolution_that_computes_its_weight_in_each_call_is_not_packed():
    """Packed, it would be run with the weight that lies there, alone and in a batch alike."""
    sizes = (8, 8, (3, 1, 1), 1, (1, 0, 0))

    def clamp(module: nn.Module, inputs: tuple[Tensor]) -> None:
        module.weight.data.clamp_(-0.01, 0.01)

    normed = nn.Conv3d(*sizes)
    normed.register_forward_pre_hook(clamp)
    for conv in (Standardised(*sizes), normed):
        net = toy(conv)
        assert net.execution == "bucketed"
        check_forced(net)
        with pytest.raises(ValueError, match="computes its weight in each call"):
            toy(conv, execution="packed")


def test_several_layers_on_a_network_that_cannot_be_packed_are_refused():
    with pytest.raises(ValueError, match="a network that cannot run packed takes one SGS layer, not 2"):
        toy(nn.GroupNorm(2, 8), after=("first", "second"))


def test_a_connection_that_passes_the_sampling_by_is_refused_in_any_execution():
    class Bypass(Toy):
        def forward(self, x: Tensor) -> Tensor:
            early = self.first(x)
            return self.pool(torch.cat((self.second(early), early), 1)).flatten(1)

    for second in (nn.ReLU(), nn.Conv3d(8, 8, 3, padding=1)):
        with pytest.raises(ValueError, match="'cat.*' also needs 'first' from before it, which keeps all frames"):
            VideoNet(Bypass(second), stages={"s": "second"}, sgs=replace(ATFR, after="s"), probe=(8, 8, 8))


@pytest.mark.parametrize("leak", [Leaky, Overall])
def test_a_packed_form_that_mixes_clips_is_found_out(leak, caplog):
    with pytest.raises(ValueError, match="logits change by .* standard deviations when clips run packed"):
        toy(leak(), execution="packed")
    with caplog.at_level(logging.WARNING):
        net = toy(leak())
    assert net.execution == "bucketed" and "standard deviations when clips run packed" in caplog.text
    check_forced(net)


def test_a_packed_form_of_ones_own_is_used():
    net = toy(Tight(), execution="packed")
    assert net.execution == "packed"
    check_forced(net)


# SlowFast's fusion by itself.


def fusion_of(rule: str, size: str) -> Fusion:
    conv = nn.Conv3d(4, 8, (SIZES[size].fusion_kernel, 1, 1), (SIZES[size].alpha, 1, 1), (SIZES[size].fusion_kernel // 2, 0, 0), bias=False)
    norm = lively_norm(nn.BatchNorm3d(8))
    source = nn.Module()
    source.conv_fast_to_slow, source.norm, source.activation = conv, norm, nn.ReLU()
    return Fusion(source, rule=rule).double().eval()


def lively_norm(norm: nn.BatchNorm3d) -> nn.BatchNorm3d:
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)  # so that a zero is not what the convolution makes of zeros
    norm.running_mean.normal_()
    return norm


def kept_of(frames: int, lengths: tuple[int, ...]) -> Segments:
    times = [average(torch.arange(float(frames)), 0, length) for length in lengths]
    return Segments(lengths, frames, torch.cat(times))


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last_3d], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("size", ["4x16-R50", "8x8-R50"])
@pytest.mark.parametrize("rule", FUSION_RULES)
def test_the_fusion_of_packed_pathways_is_that_of_each_clip(rule, size, memory):
    fusion, alpha = fusion_of(rule, size), SIZES[size].alpha
    for slow_lengths, fast_lengths in [
        ((8, 1, 3, 8, 1, 5), (8 * alpha, 1, 2 * alpha + 3, 1, 8 * alpha, alpha)),
        ((1, 1), (2, 5)),
        ((4, 4, 4), (alpha, alpha, alpha)),
        ((3,), (7,)),
    ]:
        slow_kept, fast_kept = kept_of(8, slow_lengths), kept_of(8 * alpha, fast_lengths)
        slow, fast = (
            torch.randn(1, c, sum(lengths), 3, 3, dtype=torch.float64).contiguous(memory_format=memory).requires_grad_()
            for c, lengths in ((6, slow_lengths), (4, fast_lengths))
        )
        pieces = [
            RULES[rule](fusion, *clip)
            for clip in zip(slow.split(slow_lengths, 2), fast.split(fast_lengths, 2), slow_kept.times.split(slow_lengths), fast_kept.times.split(fast_lengths))
        ]
        out, segments = fusion.packed_forward((slow, slow_kept), (fast, fast_kept))
        assert segments.lengths == tuple(piece.shape[2] for piece in pieces) and segments.frames == 8
        expected = torch.cat(pieces, dim=2)
        torch.testing.assert_close(out, expected)
        upstream = torch.randn_like(expected)
        inputs = (slow, fast, fusion.conv_fast_to_slow.weight)
        for found, wanted in zip(torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("size", ["4x16-R50", "8x8-R50"])
def test_both_rules_are_the_dense_fusion_where_all_is_kept(size):
    alpha = SIZES[size].alpha
    slow, fast = torch.randn(3, 6, 4, 3, 3, dtype=torch.float64), torch.randn(3, 4, 4 * alpha, 3, 3, dtype=torch.float64)
    for rule in FUSION_RULES:
        fusion = fusion_of(rule, size)
        packed = [(torch.cat(list(x), dim=1)[None], Segments.whole(3, x.shape[2], x.device)) for x in (slow, fast)]
        out, segments = fusion.packed_forward(*packed)
        assert segments.lengths == (4, 4, 4)
        torch.testing.assert_close(out, torch.cat(list(fusion(slow, fast)), dim=1)[None])


@pytest.mark.parametrize("rule", FUSION_RULES)
def test_what_is_not_finite_in_a_clip_reaches_no_other_through_the_fusion(rule):
    fusion = fusion_of(rule, "8x8-R50")
    slow_lengths, fast_lengths = (3, 1, 2), (2, 9, 1)
    for spoilt in range(3):
        slow, fast = torch.randn(1, 6, 6, 3, 3, dtype=torch.float64), torch.randn(1, 4, 12, 3, 3, dtype=torch.float64)
        slow.split(slow_lengths, 2)[spoilt].fill_(torch.nan)
        fast.split(fast_lengths, 2)[spoilt].fill_(torch.nan)
        out, segments = fusion.packed_forward((slow, kept_of(8, slow_lengths)), (fast, kept_of(32, fast_lengths)))
        finite = [piece.isfinite().all().item() for piece in out.split(segments.lengths, 2)]
        assert finite == [i != spoilt for i in range(3)]
