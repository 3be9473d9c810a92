"""An embedding that learns which change matters (embedding=glance)."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from run_tools import run_tool, small_job
from torch import Tensor
from torch.nn.functional import cross_entropy
from training import SETTINGS

import atfr
from atfr.engine.distributed.comm import DistInfo
from atfr.engine.forward_backward import ForwardBackward
from atfr.models.sgs.config import PRESETS, SGSConfig
from atfr.models.sgs.functional import calibrated_width, sampling_weights
from atfr.models.sgs.glance import SHORT, GlanceEmbedding

FRAMES = 8


def clips_of_two_orders(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clips in which the light of every frame flickers, and a small red square turns blue (class 0) or a blue one red at some frame: clips, labels, that frame."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    turn = torch.randint(2, FRAMES - 1, (count,), generator=random)
    clips = torch.rand(count, 1, FRAMES, 1, 1, generator=random).repeat(1, 3, 1, 16, 16)  # [N, 3, T, 16, 16]
    is_late = torch.arange(FRAMES) >= turn[:, None]  # [N, T]
    is_blue = is_late ^ (labels == 1)[:, None]
    clips[:, 0, :, 6:10, 6:10] = (~is_blue).float()[:, :, None, None]
    clips[:, 1, :, 6:10, 6:10] = 0
    clips[:, 2, :, 6:10, 6:10] = is_blue.float()[:, :, None, None]
    return clips, labels, turn


def embedding_of(**options: int) -> GlanceEmbedding:
    torch.manual_seed(0)
    return GlanceEmbedding(**{"channels": 3, "dim": 8, "grid": 16, "num_classes": 2, **options})


def network(**options) -> atfr.VideoNet:
    torch.manual_seed(0)
    return atfr.create_model("r2plus1d_tiny", num_classes=3, sgs=SGSConfig.from_preset("glance", **({"width": 0.3} | options)))


def cut_at(z: Tensor) -> Tensor:
    """Where clips z [N, T, D] are cut into two."""
    weights, _ = sampling_weights(z, num_bins=2, similarity="partition", kernel="mean", scale="absolute", order="time", width=1e-6)
    return (weights[:, 0] > 0).sum(dim=1)


def test_it_learns_to_cut_where_the_class_is_decided_and_not_where_the_light_changes():
    embedding = embedding_of()
    clips, labels, _ = clips_of_two_orders(32, seed=0)
    optimizer = torch.optim.AdamW(embedding.parameters(), lr=3e-3)
    for _ in range(100):
        z = embedding(embedding.pool(clips))
        glance = embedding.glance(z, torch.ones(z.shape[:2]))
        loss = cross_entropy(glance.logits, labels) + SHORT * glance.length
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clips, _, turn = clips_of_two_orders(64, seed=1)
    pixels = clips.flatten(3).mean(dim=3).transpose(1, 2)  # [N, T, 3]
    with torch.no_grad():
        learned = embedding(embedding.pool(clips))
    assert (cut_at(learned) == turn).float().mean() > 0.95
    assert (cut_at(pixels) == turn).float().mean() < 0.5
    width = calibrated_width(learned, num_bins=FRAMES, mean_bins=2, similarity="partition")
    _, bins = sampling_weights(learned, num_bins=FRAMES, similarity="partition", kernel="mean", scale="absolute", order="time", width=width)
    assert (bins == 2).float().mean() > 0.9


def test_its_loss_is_that_of_its_own_prediction_and_of_the_length_of_z():
    model, clips, labels = network(), torch.randn(4, 3, 8, 32, 32), torch.tensor([0, 1, 2, 0])
    layer = model.sgs["stem"]
    torch.manual_seed(5)
    _, sampling = model(clips, return_sampling=True)
    found = sampling.glance_loss(cross_entropy, labels)
    z = layer.embedding(layer.embedding.pool(clips))
    torch.manual_seed(5)
    logits = layer.embedding.classify(z, torch.ones(4, 8))
    wanted = cross_entropy(logits, labels) + 1e-3 * z.square().sum() / (4 * 8)
    torch.testing.assert_close(found, wanted)


def test_it_learns_by_its_own_loss_alone_and_the_network_by_the_other_alone():
    model, clips, labels = network(), torch.randn(4, 3, 8, 32, 32), torch.tensor([0, 1, 2, 0])
    logits, sampling = model(clips, return_sampling=True)

    def have_gradients(loss: Tensor) -> set[str]:
        model.zero_grad()
        loss.backward(retain_graph=True)
        return {name for name, p in model.named_parameters() if p.grad is not None}

    names = {name for name, _ in model.named_parameters()}
    own = {name for name in names if name.startswith("sgs.stem.embedding")}
    assert have_gradients(sampling.glance_loss(cross_entropy, labels)) == own
    assert have_gradients(cross_entropy(logits, labels)) == names - own


def test_padding_beyond_a_clips_end_changes_nothing(monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    embedding = embedding_of()
    z = torch.randn(3, FRAMES, 8)
    lengths = torch.tensor([8, 5, 3])
    together = embedding.glance(z, torch.arange(FRAMES) < lengths[:, None])
    for clip, length in enumerate(lengths.tolist()):
        alone = embedding.glance(z[clip : clip + 1, :length], torch.ones(1, length))
        torch.testing.assert_close(together.logits[clip : clip + 1], alone.logits)
    squares = [z[clip, :length].square().sum().item() for clip, length in enumerate(lengths.tolist())]
    assert together.length.item() == pytest.approx(sum(squares) / 16)


def test_a_loop_that_leaves_its_loss_out_is_told_so_and_a_frozen_one_is_not():
    model, clips = network(), torch.randn(2, 3, 8, 32, 32)
    with pytest.raises(ValueError, match="SGS after 'stem': embedding=glance learns by a loss of its own: call the model with return_sampling=True"):
        model(clips)
    before = copy.deepcopy(model.sgs.state_dict())
    model.sgs.requires_grad_(False)
    model(clips)
    _, sampling = model(clips, return_sampling=True)
    assert sampling.glance_loss(cross_entropy, torch.tensor([0, 1])) == 0
    assert all(torch.equal(value, before[name]) for name, value in model.sgs.state_dict().items())


def test_a_frozen_one_is_frozen_in_a_copy_from_a_file(tmp_path):
    model = network()
    model.sgs.requires_grad_(False)
    torch.save(model, tmp_path / "model.pt")
    assert not any(p.requires_grad for p in torch.load(tmp_path / "model.pt", weights_only=False).sgs.parameters())


@pytest.mark.parametrize("other, is_loaded", [({"num_classes": 5}, True), ({"embedding_dim": 8}, False)])
def test_weights_of_other_classes_keep_what_has_learned_and_those_of_another_size_nothing(tmp_path, other, is_loaded):
    trained = network()
    trained.sgs["stem"].embedding.steps += 7
    torch.save(trained.state_dict(), tmp_path / "trained.pt")
    options = {"num_classes": 3, "embedding_dim": 16} | other
    config = SGSConfig.from_preset("glance", width=0.3, embedding_dim=options["embedding_dim"])
    model = atfr.create_model("r2plus1d_tiny", num_classes=options["num_classes"], sgs=config, weights=tmp_path / "trained.pt")
    found, given = model.sgs["stem"].embedding, trained.sgs["stem"].embedding
    assert (found.steps == 7) == torch.equal(found.look[0].weight, given.look[0].weight) == is_loaded


def test_a_network_that_does_not_classify_is_refused():
    class Scores(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv3d(3, 4, 3, padding=1)

        def forward(self, clips: Tensor) -> Tensor:
            return self.conv(clips).mean(dim=(1, 2, 3, 4))

    with pytest.raises(ValueError, match=r"embedding=glance learns by classifying: it needs a network that gives logits \[N, classes\], not \[1\]"):
        atfr.add_sgs(Scores(), after="conv", sgs="glance")


def test_a_clip_is_the_same_alone_and_in_a_batch():
    model, clips = network(width=None).eval(), torch.randn(3, 3, 8, 32, 32)
    clips[1, :, 2:] = clips[1, :, 2:3]  # of which little is kept
    atfr.calibrate(model, clips, gflops=0.6)
    with torch.no_grad():
        logits, sampling = model(clips, return_sampling=True)
        assert len(set(sampling.bins)) > 1 and sampling.glance_loss(cross_entropy, torch.zeros(3)) == 0
        for clip in range(3):
            torch.testing.assert_close(model(clips[clip : clip + 1])[0], logits[clip])


@pytest.mark.parametrize("after", [["stem", "res3"], "input"])
def test_it_works_in_several_places(after):
    model, clips, labels = network(after=after), torch.randn(4, 3, 8, 32, 32), torch.tensor([0, 1, 2, 0])
    logits, sampling = model(clips, return_sampling=True)
    (cross_entropy(logits, labels) + sampling.glance_loss(cross_entropy, labels)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_training_step_reports_the_losses_of_network_and_embedding_apart():
    model, clips, labels = network(), torch.randn(4, 3, 8, 32, 32), torch.tensor([0, 1, 2, 0])
    settings, alone = replace(SETTINGS, batch_size=4), DistInfo(0, 1, torch.device("cpu"))
    step = ForwardBackward(model, torch.optim.SGD(model.parameters(), lr=0.1), normalise=torch.nn.Identity(), settings=settings, dist_info=alone)
    batch = SimpleNamespace(clips=clips, labels=labels)
    torch.manual_seed(5)
    result = step(batch, 0)
    assert all(p.grad is not None for p in model.parameters())
    torch.manual_seed(5)
    logits, sampling = model(clips, return_sampling=True)
    torch.testing.assert_close(result.loss, cross_entropy(logits, labels).detach())
    torch.testing.assert_close(result.glance_loss, sampling.glance_loss(cross_entropy, labels).detach())
    step.settings = replace(settings, accumulate=2)
    assert step(batch, 0).glance_loss.item() == pytest.approx(result.glance_loss.item(), abs=0.4)  # other noise, and no sum over the parts, which would be twice as much


def test_a_run_counts_the_steps_that_trained_it_and_logs_its_loss(small_videos, tmp_path):
    options = [*small_job(small_videos, tmp_path / "run", "model=r2plus1d_sgs", "model/sgs=glance", "model.sgs.keep_ratio=0.5"), "trainer.max_steps=2", "trainer.test=false"]
    assert (done := run_tool("train", *options)).code == 0, done.err
    assert torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=False)["model"]["sgs.stem.embedding.steps"] == 2
    losses = [line["glance_loss"] for line in map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines()) if line["split"] == "train"]
    assert len(losses) == 2 and all(0.3 < loss < 3 for loss in losses)  # of two classes, without a chance to learn: about log 2


def test_weights_without_a_trained_embedding_are_not_calibrated(small_videos, tmp_path):
    dense = atfr.create_model("r2plus1d_tiny", num_classes=2)
    torch.save(dense.state_dict(), tmp_path / "dense.pt")
    options = [option for option in small_job(small_videos, tmp_path / "run", "model=r2plus1d_sgs", "model/sgs=glance") if not option.startswith("trainer.epochs")]
    done = run_tool("calibrate", *options, f"model.weights={tmp_path / 'dense.pt'}", "budgets=[0.6]")
    assert done.code == 1 and "model/sgs=glance has to be trained with the network" in done.err


def test_the_preset_is_that_of_the_default_layer_but_for_what_is_compared_and_kept():
    glance, default = PRESETS["glance"].used_options(), PRESETS["atfr"].used_options()
    assert {name for name in glance if glance[name] != default.get(name)} == {"embedding", "embedding_dim", "grid", "kernel", "cost_exponent"}
