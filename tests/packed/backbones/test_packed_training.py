"""Training on packed clips: the gradients are those of the clips alone, the batch norms' statistics those of the kept features."""

from __future__ import annotations

import copy

import pytest
import torch
from placed_backbones import built, clips_for, close, in_words, paths_of
from plain_execution import forced_of, on_what_is_kept, uneven

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
