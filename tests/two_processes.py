"""Run by test_distributed.py under torchrun: what two processes must agree on. Exits non-zero if they do not."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from atfr import jobs
from atfr.data.records import Video, VideoSource
from atfr.engine import checkpoint, distributed
from atfr.engine.evaluate import evaluate
from atfr.engine.interruption import Interrupted, StopFlag
from atfr.engine.optim import sgd
from atfr.engine.settings import TrainerSettings
from atfr.engine.statistics import calibrate_width, refresh_statistics
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


def statistics_of_all(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    calibrate_width(model, lambda: batches, untrained=True)
    refresh_statistics(model, lambda: batches)
    return model.state_dict()


def check_statistics(expected: dict[str, Tensor], ranks: distributed.Ranks) -> None:
    found = statistics_of_all(network(), [clips(seed) for seed in range(ranks.rank, 4, 2)])
    for name, value in expected.items():
        if name.endswith("num_batches_tracked"):  # each process saw its own half
            continue
        torch.testing.assert_close(found[name], value, msg=name)


def refused(message: str, call: Callable[[], object]) -> None:
    """The call is, on both processes, with the same line."""
    try:
        call()
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"not refused: {message}")


def check_states_and_lists_that_differ_stop_both(folder: Path, ranks: distributed.Ranks) -> None:
    folder = folder / f"of rank {ranks.rank}"  # not shared
    state = {"model": {}, "config": {}, "choices": {}, "class_names": [], "step": 20, "evaluated": 0, "steps_per_epoch": 4}
    if ranks.rank == 0:
        checkpoint.save(state, folder / "checkpoints/last.pt")
    training = make_training(folder, ranks, batches=lambda epoch, start: [])
    refused(f"different states to go on from: evaluated is 0 on rank 0, not there on rank 1; {folder} must be on a disk", training.resume)
    refused(f"rank 1 does not see the run folder {folder}", lambda: distributed.require_shared(folder, ranks))
    videos = [Video(f"{number}.mp4", 0) for number in range(3)]
    source = VideoSource(name="lists", class_names=("a", "b" if ranks.rank else "c"), train=videos[ranks.rank :], val=videos, test=videos, notes={})
    config = OmegaConf.create({"dataset": {"_target_": "operator.attrgetter"}})
    jobs.build = lambda node, key: source
    refused("different videos or classes: class 1 is 'c' on rank 0, 'b' on rank 1; lists must be the same", lambda: jobs.load_source(config, ranks))


def check_a_signal_on_one_process_ends_the_evaluation_on_both(ranks: distributed.Ranks) -> None:
    class Batch:
        failed, clips = {"bad.mp4": "no video"}, None

    class Loader(list):
        def __iter__(self) -> Iterator[Batch]:
            for number, batch in enumerate(super().__iter__()):
                if (ranks.rank, number) == (1, 6):
                    flag.signal = signal.SIGUSR1
                yield batch

    flag = StopFlag()
    try:
        evaluate(nn.Identity(), Loader([Batch] * (14 - ranks.rank)), normalise=nn.Identity(), ranks=ranks, stop=flag)
    except Interrupted as error:
        assert "SIGUSR1 during the test" in str(error)
    else:
        raise AssertionError("the signal was not heard")
    # One batch more on one of them is no look more.
    assert len(evaluate(nn.Identity(), Loader([Batch] * (5 - ranks.rank)), normalise=nn.Identity(), ranks=ranks, stop=StopFlag()).failed) == 1


def check_a_nan_on_one_process_stops_both(folder: Path, ranks: distributed.Ranks) -> None:
    def batches(epoch: int, start: int) -> list[Batch]:
        made = [Batch(clips(10 * step + ranks.rank), torch.tensor([0, 1, 2, 0]), ("a",) * 4) for step in range(start, 4)]
        return made

    training = make_training(folder, ranks, batches)
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


def make_training(folder: Path, ranks: distributed.Ranks, batches: Callable[[int, int], list[Batch]]) -> Training:
    model = network()
    settings = TrainerSettings(
        output_dir=str(folder), batch_size=8, epochs=1, max_steps=None, seed=0, accelerator="cpu", devices=None, precision="fp32", workers=0,
        timeout_s=0, label_smoothing=0.0, clip_norm=None, statistics_clips=8, eval_every=1, save_every=1, log_every=10, resume=True, test=False,
    )  # fmt: skip
    return Training(
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


def main() -> None:
    torch.set_num_threads(1)
    expected = statistics_of_all(network(), [clips(seed) for seed in range(4)])  # before there is a group: alone
    ranks = distributed.start(accelerator="cpu", devices=2)
    assert ranks.world == 2
    check_statistics(expected, ranks)
    check_states_and_lists_that_differ_stop_both(Path(sys.argv[1]), ranks)
    check_a_signal_on_one_process_ends_the_evaluation_on_both(ranks)
    check_a_nan_on_one_process_stops_both(Path(sys.argv[1]), ranks)
    distributed.stop()


if __name__ == "__main__":
    main()
