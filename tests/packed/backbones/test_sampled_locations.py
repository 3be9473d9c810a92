"""Where SGS can be put: at the input, before an activation, and how few features each location must keep."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from backbone_cases import CASES, stages_of
from outcomes import run
from placed_backbones import ATFR, NETS, backbone, built, clips_for, close, paths_of, placed
from plain_execution import average, least, on_what_is_kept
from torch import Tensor, nn

from atfr.models.video_net import VideoNet


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
