"""Layers that embed the clip itself (`embed_from=clip`) to decide which of the features behind them go together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from outcomes import run
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from atfr.models.backbones.slowfast import slowfast
from atfr.models.backbones.torchvision3d import s3d
from atfr.models.backbones.x3d import x3d
from atfr.models.sgs.config import SGSConfig
from atfr.models.sgs.sampling import AtLeast, NonFiniteFeatures, decide, sample

CLIP = SGSConfig.from_preset("atfr", width=0.6)
FEATURES = replace(CLIP, embed_from="features")


def phases(*lengths: int) -> Tensor:
    """A clip of one picture after the other, each held for so many frames, with a little noise: [1, 3, T, 32, 32]."""
    pictures = torch.randn(3, len(lengths), 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    return (pictures.repeat_interleave(torch.tensor(lengths), 1) + 0.02 * torch.randn(3, sum(lengths), 32, 32))[None]


def test_the_cut_is_that_of_the_clip_and_the_features_are_those_behind_the_stem():
    clips = torch.cat([phases(3, 1, 10, 2), phases(16), phases(8, 8)])
    behind, at_input = (x3d(size="tiny", num_classes=3, sgs=options).eval() for options in (CLIP, replace(FEATURES, after="input")))
    (found,), (wanted,) = (run(model, clips).layers for model in (behind, at_input))
    assert found.segments.lengths == (4, 1, 2)
    assert torch.equal(found.assignment, wanted.assignment)
    assert behind.run_stem(clips)[0].shape[1] == 16  # channels of the stem, which the network behind goes on with


def test_behind_a_temporal_convolution_a_static_clip_keeps_one_feature_only_if_the_clip_is_embedded():
    clip = phases(16)
    models = [x3d(size="tiny", num_classes=3, sgs=replace(options, width=0.1)).eval() for options in (FEATURES, CLIP)]
    models[1].load_state_dict(models[0].state_dict())
    from_features, from_clip = (run(model, clip).bins for model in models)
    assert from_features[0][0] > 1 and from_clip == [(1,)]  # the stem pads with zeros, so that the ends of its output differ


def test_a_feature_of_several_frames_has_the_mean_of_theirs():
    clip = torch.randn(1, 3, 32, 32, 32)
    pooled = clip.unflatten(4, (4, 8)).unflatten(3, (4, 8)).mean(dim=(4, 6)).permute(0, 2, 1, 3, 4).flatten(2)  # [1, T, 3 x 4 x 4]
    slow, fast = run(slowfast(size="8x8-R50", num_classes=3, sgs=CLIP).eval(), clip).layers
    torch.testing.assert_close(fast.proposal.z, layer_norm(pooled, (48,)))
    torch.testing.assert_close(slow.proposal.z, layer_norm(pooled.unflatten(1, (8, 4)).mean(2), (48,)))
    (strided,) = run(s3d(size="base", num_classes=3, sgs=CLIP).eval(), clip).layers  # whose stem strides along time
    torch.testing.assert_close(strided.proposal.z, layer_norm(pooled.unflatten(1, (16, 2)).mean(2), (48,)))


def test_a_layer_behind_another_one_embeds_its_features():
    model = x3d(size="tiny", num_classes=3, sgs=replace(CLIP, after=("stem", "res3"))).eval()
    first, second = run(model, phases(4, 4, 4, 4)).layers
    assert first.proposal.z.shape[2] == 3 * 16 < second.proposal.z.shape[2]


def test_a_learned_embedding_is_built_for_what_it_embeds():
    learned = SGSConfig.from_preset("reference", embed_from="clip", kernel="linear_normalized", similarity="path", scale="absolute", width=0.6, after=("stem", "res3"), before_activation=False)
    model = x3d(size="tiny", num_classes=3, sgs=learned)
    assert model.sgs["stem"].embedding.hidden.in_features == 3 < model.sgs["res3"].embedding.hidden.in_features
    model(torch.cat([phases(4, 4, 8), phases(2, 14)])).sum().backward()
    assert model.sgs["stem"].embedding.hidden.weight.grad.abs().sum() > 0


def test_bucketed_execution_embeds_the_same_clips():
    clips = torch.cat([phases(3, 1, 10, 2), phases(16), phases(8, 8)])
    packed, bucketed = (x3d(size="tiny", num_classes=3, sgs=replace(CLIP, execution=execution)).eval() for execution in ("packed", "bucketed"))
    bucketed.load_state_dict(packed.state_dict())
    with torch.no_grad():
        assert run(bucketed, clips).bins == run(packed, clips).bins == [(4,), (1,), (2,)]
        torch.testing.assert_close(bucketed(clips), packed(clips), atol=1e-5, rtol=0)


def test_from_the_second_batch_of_a_shape_on_the_cut_is_decided_before_the_stem_and_is_the_same():
    clips = torch.cat([phases(3, 1, 10, 2), phases(16), phases(8, 8)])
    model, order = x3d(size="tiny", num_classes=3, sgs=CLIP).eval(), []
    model.sgs["stem"].register_forward_hook(lambda *_: order.append("decision"))
    next(m for m in model.modules() if isinstance(m, nn.Conv3d)).register_forward_hook(lambda *_: order.append("stem"))
    with torch.no_grad():
        first, second = run(model, clips), run(model, clips)
        assert order == ["stem", "decision", "decision", "stem"]
        assert second.bins == first.bins == [(4,), (1,), (2,)]
        torch.testing.assert_close(second.logits, first.logits, rtol=0, atol=0)
        assert run(model, clips[:2], [AtLeast(3)]).bins == [(4,), (3,)]
        assert run(model, clips[:2], [2]).bins == [(2,), (2,)]
        clips[1, 0, 3, 3, 3] = torch.nan
        with pytest.raises(NonFiniteFeatures, match="SGS after 'stem': the features of clip 1 of the batch"):
            model(clips)


def test_however_many_shapes_there_are_few_are_remembered_and_the_results_stay(monkeypatch):
    monkeypatch.setattr("atfr.models.video_net.MOST_SHAPES", 2)
    model = x3d(size="tiny", num_classes=3, sgs=SGSConfig.from_preset("atfr", width=0.4)).eval()
    batches = [torch.randn(2, 3, frames, 32, 32).cumsum(dim=2) for frames in (4, 5, 6)]
    with torch.inference_mode():
        first, second = ([model(clips) for clips in batches] for _ in range(2))
    assert len(model._frames) <= 2 and all(map(torch.equal, first, second))


def test_a_decision_for_another_number_of_features_is_made_anew():
    model = x3d(size="tiny", num_classes=3, sgs=CLIP).eval()
    layers, clips = list(model.sgs.values()), phases(8, 8)
    features = model.run_stem(clips)[:1]
    _, (done,) = sample(layers, features, [None], None, clips, decide(layers, [8], [None], None, clips))
    assert done.segments.lengths == (2,) and done.weights.shape[2] == 16


def test_features_that_are_no_numbers_are_found_though_the_clip_is_sound():
    model = x3d(size="tiny", num_classes=3, sgs=CLIP).eval()
    nn.init.constant_(next(model.parameters()), torch.inf)
    for _ in range(2):  # the second time the cut is decided before the stem runs
        with pytest.raises(NonFiniteFeatures, match="SGS after 'stem': the features of clip 0 of the batch"):
            model(phases(8, 8))


def test_a_baseline_embeds_nothing():
    model = x3d(size="tiny", num_classes=3, sgs=SGSConfig.from_preset("uniform", num_bins=4)).eval()
    assert len(model.run_stem(phases(8, 8))) == 1 and run(model, phases(8, 8)).bins == [(4,)]
