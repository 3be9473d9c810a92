"""Run by test_distributed.py as two ranks: checks on which two ranks must agree. Exits non-zero if they do not."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Callable, Iterable, Iterator

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from training import SETTINGS, Batch, trainer_of

from atfr.cli import builders
from atfr.data.types import Unreadable, Video, VideoSource
from atfr.engine.distributed import comm
from atfr.engine.distributed.preemption import Interrupted, StopFlag
from atfr.engine.evaluator import evaluate
from atfr.engine.run import checkpoint
from atfr.engine.trainer import Trainer
from atfr.models.backbones.x3d import x3d
from atfr.models.sgs.config import SGSConfig

ATFR = SGSConfig.from_preset("atfr", keep_ratio=0.5)


def network() -> nn.Module:
    torch.manual_seed(0)
    return x3d(size="tiny", num_classes=3, dropout=0.0, sgs=ATFR)


def clips(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 8, 32, 32, generator=generator).cumsum(dim=2) / 4


def four_steps(folder: Path, dist_info: comm.DistInfo, *, broken: tuple[int, ...] = (), **changes: object) -> Trainer:
    """Build a trainer for four steps. At the `broken` ones a clip of rank 1 has a NaN."""

    def batches(epoch: int, start: int) -> Iterable[Batch]:
        for step in range(start, 4):
            x = clips(10 * step + dist_info.rank)
            if step in broken and dist_info.rank == 1:
                x[3, 0, 0, 0, 0] = torch.nan
            yield Batch(x, torch.tensor([0, 1, 2, 0]), (f"clip {step}.{dist_info.rank}",) * 4)

    settings = replace(SETTINGS, statistics_clips=8, save_every=1, log_every=10, **changes)
    return trainer_of(network(), folder, lr=0.01, batches=batches, steps_per_epoch=4, settings=settings, dist_info=dist_info)


def refused(message: str, call: Callable[[], object]) -> None:
    """Require that the call fails on both ranks with the same message."""
    try:
        call()
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"not refused: {message}")


def check_that_different_checkpoints_and_lists_are_refused_on_both(folder: Path, dist_info: comm.DistInfo) -> None:
    folder = folder / f"of rank {dist_info.rank}"  # not shared
    state = {"model": {}, "config": {}, "choices": {}, "class_names": [], "step": 20, "evaluated": 0, "steps_per_epoch": 4}
    if dist_info.rank == 0:
        checkpoint.save(state, folder / "checkpoints/last.pt")
    trainer = four_steps(folder, dist_info)
    refused(f"different checkpoints to resume from: evaluated is 0 on rank 0, missing on rank 1; {folder} must be on a disk", trainer.resume)
    refused(f"rank 1 does not see the run folder {folder}", lambda: comm.require_shared(folder, dist_info))
    videos = [Video(f"{number}.mp4", 0) for number in range(3)]
    source = VideoSource(name="lists", class_names=("a", "b" if dist_info.rank else "c"), train=videos[dist_info.rank :], val=videos, test=videos, notes={})
    config = OmegaConf.create({"dataset": {"_target_": "operator.attrgetter"}})
    builders.build = lambda node, key: source
    refused("different videos or classes: class 1 is 'c' on rank 0, 'b' on rank 1; lists must be the same", lambda: builders.load_source(config, dist_info))


def check_that_a_signal_on_one_rank_ends_the_evaluation_on_both(dist_info: comm.DistInfo) -> None:
    class Batch:
        failed, clips = (Unreadable(0, "bad.mp4", "no video"),), None

    class Loader(list):
        def __iter__(self) -> Iterator[Batch]:
            for number, batch in enumerate(super().__iter__()):
                if (dist_info.rank, number) == (1, 6):
                    flag.signal = signal.SIGUSR1
                yield batch

    flag = StopFlag()
    try:
        evaluate(nn.Identity(), Loader([Batch] * (14 - dist_info.rank)), normalise=nn.Identity(), dist_info=dist_info, stop=flag)
    except Interrupted as error:
        assert "SIGUSR1 during the test" in str(error)
    else:
        raise AssertionError("the signal was not noticed")
    # One more batch on one rank does not mean one more check.
    assert len(evaluate(nn.Identity(), Loader([Batch] * (5 - dist_info.rank)), normalise=nn.Identity(), dist_info=dist_info, stop=StopFlag()).failed) == 1


def check_that_delayed_max_returns_the_previous_result(dist_info: comm.DistInfo) -> None:
    delayed = comm.DelayedMax()
    numbers = [0, 5 if dist_info.rank else 0, 0, 3, 0]
    assert [delayed.largest(number) for number in numbers] == [0, 0, 5, 0, 3]


def check_that_a_nan_on_one_rank_stops_both(folder: Path, dist_info: comm.DistInfo) -> None:
    trainer = four_steps(folder, dist_info)
    loss = trainer.forward_backward.loss
    trainer.forward_backward.loss = lambda logits, labels: loss(logits, labels) * (float("nan") if dist_info.rank == 1 and trainer.state.step == 2 else 1.0)
    try:
        trainer.run()
    except FloatingPointError as error:
        assert "at step 3" in str(error), error
    else:
        raise AssertionError("a NaN went unnoticed")
    comm.barrier()  # the first process writes while it ends
    state = checkpoint.load(trainer.checkpointer.last)
    assert state["step"] == 2, state["step"]
    assert all(value.isfinite().all() for name, value in state["model"].items() if not name.endswith("_extra_state"))


def check_that_both_ranks_skip_a_nan_in_the_features_of_one(folder: Path, dist_info: comm.DistInfo) -> None:
    """Also in the second part of an accumulated batch, and across a restart of the run."""
    trainer = four_steps(folder / "two", dist_info, broken=(1, 2), skip_nonfinite=2, accumulate=2)
    trainer.run()
    assert trainer.state.step == 4 and trainer.state.skipped == 2 and trainer.state.skipped_in_a_row == 0
    assert all(value.isfinite().all() for value in (*trainer.model.parameters(), *trainer.model.buffers()))
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    assert torch.equal(*comm.gathered([weights]))

    started = four_steps(folder / "four", dist_info, broken=(1, 2, 3), skip_nonfinite=2, max_steps=3)
    started.run()
    assert started.state.skipped_in_a_row == 2
    try:
        four_steps(folder / "four", dist_info, broken=(1, 2, 3), skip_nonfinite=2).run()
    except FloatingPointError as error:
        assert "step 4 is number 3 in a row" in str(error) and f"clip 3.{dist_info.rank}" in str(error), error
    else:
        raise AssertionError("a third step in a row was skipped")


def main(folder: Path) -> None:
    dist_info = comm.start(accelerator="cpu", devices=2)
    assert dist_info.world == 2
    check_that_different_checkpoints_and_lists_are_refused_on_both(folder, dist_info)
    check_that_a_signal_on_one_rank_ends_the_evaluation_on_both(dist_info)
    check_that_delayed_max_returns_the_previous_result(dist_info)
    check_that_a_nan_on_one_rank_stops_both(folder / "stops", dist_info)
    check_that_both_ranks_skip_a_nan_in_the_features_of_one(folder, dist_info)
    comm.stop()
