"""Run by test_distributed.py under torchrun: what two processes must agree on. Exits non-zero if they do not."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from atfr.engine import checkpoint, distributed
from atfr.engine.optim import sgd
from atfr.engine.settings import TrainerSettings
from atfr.engine.train import Training
from atfr.models.sgs_layer import SGSOptions
from atfr.models.backbones.x3d import x3d

ATFR = SGSOptions(similarity="anchor", kernel="mean", scale="absolute", order="time", embedding="pooled", before_activation=False)


@dataclass
class Batch:
    clips: Tensor
    labels: Tensor
    paths: tuple[str, ...]
    bad: tuple[str, ...] = ()


def network() -> nn.Module:
    torch.manual_seed(0)
    return x3d(size="tiny", num_classes=3, dropout=0.0, sgs=ATFR)


def clips(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 8, 32, 32, generator=generator).cumsum(dim=2) / 4


def check_a_nan_on_one_process_stops_both(folder: Path, ranks: distributed.Ranks) -> None:
    def batches(epoch: int, start: int) -> list[Batch]:
        made = [Batch(clips(10 * step + ranks.rank), torch.tensor([0, 1, 2, 0]), ("a",) * 4) for step in range(start, 4)]
        return made

    model = network()
    settings = TrainerSettings(
        output_dir=str(folder), batch_size=8, epochs=1, max_steps=None, seed=0, accelerator="cpu", devices=None, precision="fp32", workers=0,
        timeout_s=0, label_smoothing=0.0, clip_norm=None, statistics_clips=8, eval_every=1, save_every=1, log_every=10, resume=True, test=False,
    )  # fmt: skip
    training = Training(
        model=model,
        optimizer=sgd(model, lr=0.01, momentum=0.9, weight_decay=0.0, nesterov=True),
        learning_rate_factor=lambda step, total: 1.0,
        batches=batches,
        steps_per_epoch=4,
        validate=lambda: {"top1": 0.0},
        normalise=nn.Identity(),
        settings=settings,
        ranks=ranks,
        folder=folder,
        identity={"config": {}, "choices": {}, "class_names": []},
    )
    loss = training.loss
    training.loss = lambda logits, labels: loss(logits, labels) * (float("nan") if ranks.rank == 1 and training.step == 2 else 1.0)
    try:
        training.run()
    except FloatingPointError as error:
        assert "at step 3" in str(error), error
    else:
        raise AssertionError("a NaN went unnoticed")
    state = checkpoint.load(training.last)
    assert state["step"] == 2, state["step"]
    assert all(value.isfinite().all() for value in state["model"].values())


def main() -> None:
    torch.set_num_threads(1)
    ranks = distributed.start(accelerator="cpu", devices=2)
    assert ranks.world == 2
    check_a_nan_on_one_process_stops_both(Path(sys.argv[1]), ranks)
    distributed.stop()


if __name__ == "__main__":
    main()
