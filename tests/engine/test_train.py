"""The training step: accumulation, averaged weights, and skipped steps, compared with plain loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from training import SETTINGS, Batch, batch, network, train

from atfr.engine.calibration import draw_keep_ratios
from atfr.engine.run import checkpoint
from atfr.engine.validation import Validation
from atfr.models.backbones.x3d import x3d
from atfr.models.sgs.config import SGSConfig


def plain_loop(batches: list[Batch]) -> list[dict[str, Tensor]]:
    """Train without the trainer; return the weights after each step."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    seen = []
    for each in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.dense_network(each.clips), each.labels).backward()
        optimizer.step()
        seen.append({name: value.detach().clone() for name, value in model.state_dict().items()})
    return seen


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_accumulated_parts_train_like_the_whole_batch_even_if_the_last_is_smaller(tmp_path, parts):
    batches = [batch(seed) for seed in range(4)]
    trainer = train(tmp_path, batches, replace(SETTINGS, accumulate=parts))
    torch.testing.assert_close(dict(trainer.model.state_dict()), plain_loop(batches)[-1], rtol=1e-3, atol=2e-5)  # of float32 sums in another order


def test_the_width_of_a_batch_in_parts_is_steered_by_all_of_its_clips(tmp_path):
    """Batch norm is frozen, so only the counts could differ."""

    def width(parts: int) -> float:
        torch.manual_seed(0)
        sgs = SGSConfig.from_preset("atfr", keep_ratio=0.5)
        model = x3d(size="tiny", num_classes=3, dropout=0.0, sgs=sgs)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.momentum = 0.0
                module.train = lambda mode=True, module=module: nn.Module.train(module, False)
        wide = Batch(torch.randn(8, 3, 8, 32, 32, generator=torch.Generator().manual_seed(1)).cumsum(dim=2) / 4, torch.zeros(8, dtype=torch.int64), ("a",) * 8)
        trainer = train(tmp_path / str(parts), [wide], replace(SETTINGS, accumulate=parts), model)
        return next(iter(trainer.model.sgs.values())).width.item()

    assert width(3) == pytest.approx(width(1), rel=1e-5)


def test_averaged_weights_are_validated_and_saved_and_training_continues_with_its_own(tmp_path):
    batches, validated = [batch(seed) for seed in range(4)], []
    model = network()

    def validate() -> Validation:
        validated.append({name: value.detach().clone() for name, value in model.state_dict().items()})
        return Validation({"top1": 1.0})

    trainer = train(tmp_path, batches, replace(SETTINGS, ema=0.15), model, validate=validate)
    average = dict(network().state_dict())
    weights = plain_loop(batches)
    for n, after in enumerate(weights):
        decay = min(0.15, (1 + n) / (10 + n))
        average = {name: decay * average[name] + (1 - decay) * after[name] for name in after}
    torch.testing.assert_close(validated, [average])
    torch.testing.assert_close(checkpoint.load(trainer.checkpointer.best)["model"], average, check_dtype=False)
    torch.testing.assert_close(dict(model.state_dict()), weights[-1])
    torch.testing.assert_close(dict(checkpoint.load(trainer.checkpointer.last)["model"]), weights[-1])


def test_a_step_that_is_not_finite_is_skipped_and_changes_nothing(tmp_path, caplog):
    batches = [batch(0), batch(1, broken=True), batch(2)]
    trainer = train(tmp_path, batches, replace(SETTINGS, skip_nonfinite=1))
    torch.testing.assert_close(dict(trainer.model.state_dict()), plain_loop([batch(0), batch(2)])[-1])
    assert trainer.state.step == 3 and trainer.state.skipped == 1 and "step 2 skipped: the loss is nan" in caplog.text and "clip 1.0" in caplog.text


def test_a_step_with_features_that_are_not_finite_is_skipped_and_leaves_batch_norm_finite(tmp_path):
    torch.manual_seed(0)
    model = x3d(size="tiny", num_classes=3, sgs=SGSConfig.from_preset("reference"))
    trainer = train(tmp_path, [batch(0), batch(1, broken=True), batch(2)], replace(SETTINGS, skip_nonfinite=1), model)
    assert trainer.state.skipped == 1 and all(value.isfinite().all() for value in (*model.parameters(), *model.buffers()))


def test_too_many_skipped_steps_in_a_row_are_an_error_that_names_the_clips(tmp_path):
    batches = [batch(0, broken=True), batch(1), batch(2, broken=True), batch(3, broken=True)]
    with pytest.raises(FloatingPointError, match=r"step 4 is number 2 in a row .*clip 3.0"):
        train(tmp_path, batches, replace(SETTINGS, skip_nonfinite=1))


def test_a_drawn_keep_ratio_depends_on_the_step_alone_and_not_on_the_rank_or_what_came_before():
    first, second = (x3d(size="tiny", num_classes=3, sgs=SGSConfig(gflops_range=(0.3, 1.0))) for _ in range(2))
    for model in (first, second):
        model.sgs["stem"].set_budget(0.5, (0.2, 0.9))
    drawn = []
    for step in range(40):
        draw_keep_ratios(first, seed=3, step=step)
        drawn.append(first.sgs["stem"]._drawn_ratio)
    draw_keep_ratios(second, seed=3, step=17)
    assert second.sgs["stem"]._drawn_ratio == drawn[17]
    assert 0.2 <= min(drawn) < 0.3 and 0.8 < max(drawn) <= 0.9 and len(set(drawn)) == 40
