"""Packed execution of every backbone: a clip in a batch, a clip alone, and the plain network on what the clip keeps."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from backbone_cases import CASES, CLASSES
from outcomes import run
from placed_backbones import ATFR, NETS, REFERENCE, built, calibrated, check_alone_and_in_batches, clips_for, close, in_words, paths_of
from plain_execution import forced_of, on_what_is_kept, uneven
from tiers import slow_but

from atfr.models.backbones.slowfast import FUSION_RULES
from atfr.models.video_net import VideoNet

# (name, location, fusion rule); the rule only matters to a SlowFast
PLACED = [
    (name, location, rule)
    for name, net in NETS.items()
    for location in (*net.locations, net.block)
    for rule in (FUSION_RULES if name.startswith("slowfast") else ("aligned",))
]


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


@pytest.mark.parametrize("name", slow_but(NETS, QUICK.__contains__))
def test_sgs_leaves_the_names_of_the_backbones_parameters_unchanged(name):
    case = CASES[name]
    with torch.device("meta"):
        dense = case.build(size=case.size, num_classes=CLASSES).state_dict()
        sampled = case.build(size=case.size, num_classes=CLASSES, sgs=replace(ATFR, after=["res2", "res4"]))
    assert [key for key in sampled.state_dict() if not key.startswith("sgs.")] == list(dense)
    assert sampled.execution == "packed"
