"""Networks of libraries and of one's own, as they are, behind `model=custom`; and what refuses them."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Callable

import pytest
import torch
from outcomes import run
from pytorchvideo.models import hub
from pytorchvideo.models.x3d import create_x3d
from tiers import slow_but
from torch import Tensor, fx, nn
from torchvision.models import video
from toy_network import Toy
from uneven_clips import lively, uneven_clips

from atfr.models.backbones.custom import custom
from atfr.models.sgs.config import SGSConfig
from atfr.models.video_net import VideoNet

ATFR = SGSConfig.from_preset("atfr", width=0.3)
CLASSES = 6


def slow_of_small_clips(**options: object) -> nn.Module:
    """pytorchvideo's, whose function takes no other head."""
    network = hub.slow_r50(pretrained=False, **options)
    network.blocks[5].pool.kernel_size = (8, 2, 2)
    return network


LIBRARYS = {"slow": slow_of_small_clips, "x3d": functools.partial(create_x3d, input_clip_length=8, input_crop_size=64)}


def ours(build: Callable[..., nn.Module], probe: tuple[int, int, int] = (8, 64, 64), after: str | None = "blocks.1") -> VideoNet:
    sgs = replace(ATFR, after=after) if after else None
    return custom(backbone=build, num_classes=CLASSES, classes_argument="model_num_class", probe=probe, sgs=sgs)


def average_of_bins(x: Tensor, bins: int) -> Tensor:
    """[N, C, T, H, W] averaged to so many contiguous groups of equal size (+-1)."""
    length = x.shape[2]
    return torch.stack([x[:, :, [t for t in range(length) if t * bins // length == b]].mean(dim=2) for b in range(bins)], dim=2)


@pytest.mark.parametrize("name", slow_but(LIBRARYS, "x3d".__eq__))
def test_pytorchvideos_own_networks_run_packed_as_they_come(name):
    net = ours(LIBRARYS[name])
    assert net.execution == "packed"
    lively(net, 8, 64)
    clips = uneven_clips(3, 8, 64)
    bins = (1, 8, 4)
    with torch.no_grad():
        batch = net(clips, [bins])
        for clip, kept, logits in zip(clips, bins, batch):
            handle = net.dense_network.blocks[1].register_forward_hook(lambda module, inputs, output: average_of_bins(output, kept))
            torch.testing.assert_close(logits, net.dense_network(clip[None])[0], atol=1e-4, rtol=0)
            handle.remove()


class Headed(nn.Module):
    """A convolution, batch norm, one over time, and a head that averages the clip in its own way."""

    def __init__(self, average: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.average = average
        self.stem = nn.Conv3d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm3d(8)
        self.temporal = nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.average(torch.relu(self.temporal(self.norm(self.stem(x))))))


AVERAGES = {
    "a functional pool": lambda x: nn.functional.adaptive_avg_pool3d(x, 1).flatten(1),
    "a functional pool of three sizes": lambda x: nn.functional.adaptive_avg_pool3d(x, output_size=(1, 1, 1))[:, :, 0, 0, 0],
    "space, then time": lambda x: x.mean((3, 4)).mean(2),
    "space, then time, by names": lambda x: torch.mean(torch.mean(x, dim=[-2, -1]), dim=-1),
    "all positions": lambda x: x.flatten(2).mean(2),
    "all positions, by names": lambda x: torch.flatten(x, start_dim=2, end_dim=-1).mean(dim=(-1,)),
    "at once": lambda x: x.mean((2, 3, 4)),
    "the largest": lambda x: x.amax((2, 3, 4)),
    "the largest, by names": lambda x: torch.amax(x, dim=(-3, -2, -1), keepdim=True).flatten(1),
}  # fmt: skip


@pytest.mark.parametrize("name", AVERAGES)
def test_a_head_may_average_the_clip_in_any_of_the_usual_ways(name):
    network = Headed(AVERAGES[name])
    net = lively(VideoNet(network, sgs=SGSConfig.from_preset("uniform", after="stem", num_bins=3)), 8, 16).eval()
    assert net.execution == "packed"
    clips, bins = uneven_clips(3, 8, 16), (1, 8, 4)
    with torch.no_grad():
        for clip, kept, logits in zip(clips, bins, net(clips, [bins])):
            handle = network.stem.register_forward_hook(lambda module, inputs, output: average_of_bins(output, kept))
            torch.testing.assert_close(logits, network(clip[None])[0], atol=1e-5, rtol=0)
            handle.remove()


class Sized(Headed):
    """Reads the number of clips before SGS, or of the sampled features, and uses it behind."""

    def __init__(self, size: Callable[[Tensor], object], norm: nn.Module, *, before: bool) -> None:
        super().__init__(nn.AdaptiveMaxPool3d(1))
        self.size, self.norm, self.before = size, norm, before

    def forward(self, x: Tensor) -> Tensor:
        features = torch.relu(self.temporal(self.norm(self.stem(x))))
        clips = self.size(x if self.before else features)
        return self.head(self.average(features).view(clips, -1))


def unpacked(x: Tensor) -> object:
    n, c, t, h, w = x.shape
    return n


SIZES = {"shape": lambda x: x.shape[0], "size": lambda x: x.size(0), "size, by name": lambda x: x.size(dim=0), "all sizes": lambda x: x.size()[0], "a slice": lambda x: x.shape[:2][0], "unpacked": unpacked}


@pytest.mark.parametrize("execution, before", [("packed", True), ("packed", False), ("bucketed", True)])
@pytest.mark.parametrize("size", SIZES)
def test_the_number_of_clips_may_be_read_before_and_behind_sgs(size, execution, before):
    if size == "unpacked" and not before:
        pytest.skip("a number of frames is read, too, which differs from clip to clip")
    network = Sized(SIZES[size], nn.GroupNorm(2, 8), before=before)
    net = VideoNet(network, sgs=replace(ATFR, after="stem", width=0.3, execution=execution), probe=(8, 16, 16)).eval()
    assert net.execution == execution
    clips, bins = uneven_clips(3, 8, 16), (1, 8, 4)
    with torch.no_grad():
        for clip, kept, logits in zip(clips, bins, net(clips, [bins])):
            alone = net(clip[None], [(kept,)])[0]
            torch.testing.assert_close(logits, alone, atol=1e-5, rtol=0)
        handle = network.stem.register_forward_hook(lambda module, inputs, output: average_of_bins(output, bins[1]))
        torch.testing.assert_close(net(clips, [bins])[1], network(clips[1:2])[0], atol=1e-5, rtol=0)
        handle.remove()


class Otherwise(Headed):
    """Does with the averages whatever the test says."""

    def __init__(self, end: Callable[[Tensor, Tensor, Tensor], object], channels: int = 3) -> None:
        super().__init__(lambda x: x)
        self.end, self.stem = end, nn.Conv3d(channels, 8, 3, padding=1)
        self.position = nn.Parameter(torch.randn(1, 8, 8, 1, 1))

    def forward(self, x: Tensor) -> object:
        return self.end(x, self.temporal(self.stem(x)), self.position)


REFUSED = {
    "a tuple": (lambda x, y, p: (y.mean((2, 3, 4)), y), "returns its logits .* alone, not a tuple"),
    "a dict": (lambda x, y, p: {"logits": y.mean((2, 3, 4))}, "returns its logits .* alone, not a dict"),
    "a product of sizes": (lambda x, y, p: y.mean((2, 3, 4)).view(x.size(0) * 1, -1), "a size that is read before SGS, is used behind it"),
    "a number of frames": (lambda x, y, p: y.mean((3, 4)).view(y.size(0), 8, x.shape[2]).mean(2), "a size that is read before SGS, is used behind it"),
    "a position of each frame": (lambda x, y, p: (y + p).mean((2, 3, 4)), "what follows does not run behind SGS, at 'add'.*: The size of tensor"),
}


@pytest.mark.parametrize("end", REFUSED)
def test_what_a_network_cannot_do_behind_sgs_is_said_in_one_line(end, capfd):
    forward, said = REFUSED[end]
    with pytest.raises(ValueError, match=said) as error:
        VideoNet(Otherwise(forward), sgs=replace(ATFR, after="stem"))
    assert "\n" not in str(error.value) and not capfd.readouterr().err


def test_a_network_for_other_clips_than_of_three_channels_is_refused(capfd):
    with pytest.raises(ValueError, match=r"cannot run on a clip \[1, 3, 16, 64, 64\]: .* to have 1 channels.*; SGS takes clips of 3 channels"):
        VideoNet(Otherwise(lambda x, y, p: y.mean((2, 3, 4)), channels=1), sgs=replace(ATFR, after="stem"))
    assert not capfd.readouterr().err


@pytest.mark.parametrize("average", [lambda x: x.flatten(2)[:, :, 1:].mean(2), lambda x: x.flatten(2).amax(2), lambda x: x.mean((3, 4)).mean(2) + x.mean((3, 4)).amax(2)])
def test_a_head_that_does_more_than_average_is_not_taken_for_one(average):
    assert VideoNet(Headed(average), sgs=SGSConfig.from_preset("uniform", after="stem", num_bins=3)).execution == "bucketed"


@pytest.mark.parametrize("name", slow_but(LIBRARYS, "x3d".__eq__))
def test_a_librarys_network_is_what_it_was_on_the_clip_that_it_is_of(name):
    net = lively(ours(LIBRARYS[name], after=None), 8, 64).eval()
    theirs = LIBRARYS[name](model_num_class=CLASSES).eval()
    theirs.load_state_dict(net.dense_network.state_dict())
    clips = torch.randn(2, 3, 8, 64, 64)
    with torch.no_grad():
        logits, expected = net(clips), theirs(clips)
    found = logits.softmax(dim=1) if name == "x3d" else logits  # the library's ends in a softmax
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_an_average_over_part_of_a_clip_and_a_softmax_inside_the_network_stay():
    class Attentive(Toy):
        def __init__(self, num_classes: int) -> None:
            super().__init__(nn.AvgPool3d((2, 8, 8)))
            self.attention, self.head = nn.Softmax(dim=1), nn.Linear(8, num_classes)

        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return self.head(x * self.attention(x))

    net = custom(backbone=Attentive, num_classes=CLASSES, probe=(4, 8, 8)).dense_network
    assert isinstance(net.second, nn.AvgPool3d) and isinstance(net.attention, nn.Softmax)


@pytest.mark.parametrize("build, probe", [pytest.param(hub.slow_r50, (8, 224, 224), marks=pytest.mark.slow), (hub.x3d_xs, (4, 160, 160))])
def test_the_functions_of_pytorchvideos_hub_run_packed_with_their_published_heads(build, probe):
    net = ours(build, probe).eval()
    assert net.execution == "packed"
    with torch.no_grad():
        assert net(torch.randn(2, 3, 6, 96, 96), [(4, 2)]).isfinite().all()


def test_a_network_that_runs_on_no_fewer_features_than_all_is_refused_naming_what_needs_them():
    block = video.mvit.MSBlockConfig(1, 16, 16, (3, 3, 3), (3, 3, 3), (1, 1, 1), (1, 2, 2))
    small = functools.partial(video.mvit.MViT, (64, 64), 8, [block, block])
    with pytest.raises(ValueError, match=r"after='conv_proj': what follows runs on all 4 features and on no fewer, so sample at a later location. With one less, .* in pos_encoding says: The size of tensor"):
        custom(
            backbone=functools.partial(small, residual_pool=False, residual_with_cls_embed=False, rel_pos_embed=False, proj_after_attn=False),
            num_classes=CLASSES,
            probe=(8, 64, 64),
            sgs=replace(ATFR, after="conv_proj"),
        )


class Unpacked(nn.Module):
    """Something without a packed form that runs on some numbers of features only."""

    def __init__(self, good: tuple[int, ...]) -> None:
        super().__init__()
        self.good = good

    def forward(self, x: Tensor) -> Tensor:
        return require(x.cumsum(2), self.good)


@fx.wrap
def require(x: Tensor, good: tuple[int, ...]) -> Tensor:
    if x.shape[2] not in good:
        raise RuntimeError(f"{x.shape[2]} features will not do")
    return x


def toy(second: nn.Module, **options: object) -> VideoNet:
    return VideoNet(Toy(second), stages={}, sgs=replace(ATFR, after="first", **options), probe=(8, 8, 8)).eval()


def test_bucketed_clips_keep_as_many_features_as_the_rest_can_run_on():
    net = toy(Unpacked((3, 4, 5, 6, 7, 8)), width=1e3)
    assert net.execution == "bucketed" and net.sgs["first"].min_bins == 3
    static = torch.randn(2, 3, 1, 8, 8).expand(-1, -1, 8, -1, -1)
    with torch.no_grad():
        assert run(net, static).bins == [(3,), (3,)]


def test_bucketed_clips_never_keep_a_number_that_the_rest_cannot_run_on():
    assert toy(Unpacked((1, 3, 4, 6, 7, 8))).sgs["first"].min_bins == 6
    with pytest.raises(ValueError, match="runs on all 8 features and on no fewer, so sample at a later location. With one less, .*require.* in second says: 7 features will not do"):
        toy(Unpacked((2, 4, 6, 8)))


class Difference(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, 1:] - x[:, :, :-1]


def test_bucketed_clips_keep_so_many_features_that_no_nan_comes_out():
    net = toy(Difference(), width=1e3)  # the mean of no difference is NaN
    assert net.execution == "bucketed" and net.sgs["first"].min_bins == 2
    with torch.no_grad():
        assert net(torch.zeros(2, 3, 8, 8, 8)).isfinite().all()


class Untraceable(Toy):
    def __init__(self, looks: Callable[[Tensor], object]) -> None:
        super().__init__(nn.Identity())
        self.looks = looks

    def forward(self, x: Tensor) -> Tensor:
        self.looks(x)
        return super().forward(x)


class Dropping(Toy):
    """Drops half of all values in training, by a module of its own or in the network's forward."""

    def __init__(self, by_module: bool) -> None:
        super().__init__(nn.Identity())
        self.drop, self.by_module = Drop(), by_module

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.drop(x) if self.by_module else nn.functional.dropout(x, 0.5, self.training))


class Drop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, self.training)


def test_a_module_that_reads_its_mode_runs_in_each_and_a_network_that_does_is_refused():
    options = dict(stages={}, sgs=replace(ATFR, after="first"), probe=(8, 8, 8))
    net, clips = VideoNet(Dropping(True), **options), torch.randn(2, 3, 8, 8, 8)
    torch.testing.assert_close(net.eval().run_stem(clips)[0], net.first(clips))
    assert not torch.allclose(net.train().run_stem(clips)[0], net.first(clips))
    with pytest.raises(ValueError, match="traces Dropping differently for training and evaluation, at 'dropout'.*use a module"):
        VideoNet(Dropping(False), **options)


@pytest.mark.parametrize(
    "looks, reason",
    [
        (lambda x: range(x.shape[1] // 8), "'Proxy' object cannot be interpreted as an integer"),
        (lambda x: [*x], "Proxy object cannot be iterated"),
        (lambda x: 1 if x.sum() > 0 else 2, "symbolically traced variables cannot be used as inputs to control flow"),
        (lambda x: {}["no"], "'no'"),
    ],
)
def test_a_network_that_cannot_be_traced_is_refused_with_the_place_in_its_code(looks, reason):
    with pytest.raises(ValueError, match=f"torch.fx cannot trace Untraceable, .*: {reason}.* at .*test_any_network.py:{looks.__code__.co_firstlineno}; .* packed_forward") as error:
        VideoNet(Untraceable(looks), stages={}, sgs=replace(ATFR, after="first"))
    assert "\n" not in str(error.value)
