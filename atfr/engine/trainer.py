"""Training: the loop over epochs, its steps, validation, checkpoints, and resuming from them."""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, TypeVar

import torch
from torch import Tensor, nn

from atfr.data.mixup import Mix
from atfr.data.types import ClipBatch
from atfr.engine.calibration import calibrate_layers, clips_for_statistics, draw_keep_ratios, refresh_statistics, statistics_batches, steer_widths
from atfr.engine.data_wait import DataWait
from atfr.engine.distributed import comm
from atfr.engine.distributed.comm import DistInfo
from atfr.engine.distributed.preemption import Interrupted, StopFlag
from atfr.engine.distributed.sync_batchnorm import sync_batchnorm
from atfr.engine.ema import Ema
from atfr.engine.forward_backward import BatchResult, ForwardBackward
from atfr.engine.optim import Schedule, learning_rates, load_optimizer
from atfr.engine.prefetch import prefetched
from atfr.engine.run import checkpoint
from atfr.engine.run.checkpointer import Checkpointer
from atfr.engine.run.contents import checked_identity
from atfr.engine.run.metric_buffer import REMEDY, MetricBuffer, shortened
from atfr.engine.run.metric_logger import MetricLogger
from atfr.engine.run.profiler import profiler
from atfr.engine.run.run_dir import way_out
from atfr.engine.settings import TrainerSettings
from atfr.engine.validation import Validation
from atfr.models.sgs.sampling import NonFiniteFeatures
from atfr.models.video_net import VideoNet
from atfr.utils.memory import memory_in_use
from atfr.utils.progress import StepProgress, watched

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class TrainState:
    """Where a training is, as saved in each checkpoint."""

    step: int = 0  # optimizer steps done, including skipped ones
    evaluated: int = 0  # the last step after which `finish_epoch` was completed
    best_top1: float = -1.0  # of the validations so far
    skipped: int = 0  # steps that were skipped because the loss or the gradient was not finite
    skipped_in_a_row: int = 0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in asdict(self):
            setattr(self, name, state[name])


class Trainer:
    """Trains a network in a run folder, and resumes from the newest checkpoint that is there.

    Args:
        model: the network, already on this rank's device.
        learning_rate_factor: the schedule.
        batches: `batches(epoch, n)` gives this rank's training batches of an epoch, starting at its n-th.
        steps_per_epoch: number of batches in an epoch.
        validate: returns the result of the model on the validation split. The checkpoint with the highest `top1` is kept as
            `best.pt`.
        normalise: converts clips from uint8 to the network's input.
        folder: the run folder.
        identity: plain data for every checkpoint: config, class names, and the `contents` of the data files.
        hyperparameters: what TensorBoard compares runs by.
        mix: mixup or CutMix, called with clips, labels and step; None: off.
        stop: set by a signal. Training then saves a checkpoint after the current step and raises Interrupted.
    """

    def __init__(
        self,
        *,
        model: VideoNet,
        optimizer: torch.optim.Optimizer,
        learning_rate_factor: Schedule,
        batches: Callable[[int, int], Iterable[ClipBatch]],
        steps_per_epoch: int,
        validate: Callable[[], Validation],
        normalise: nn.Module,
        settings: TrainerSettings,
        dist_info: DistInfo,
        folder: Path,
        identity: Mapping[str, Any],
        hyperparameters: Mapping[str, str | float] = {},
        mix: Mix | None = None,
        stop: StopFlag | None = None,
    ) -> None:
        self.model, self.optimizer, self.learning_rate_factor = model, optimizer, learning_rate_factor
        self.batches, self.steps_per_epoch, self.validate = batches, steps_per_epoch, validate
        self.normalise, self.settings, self.dist_info = normalise, settings, dist_info
        self.folder, self.identity, self.stop = folder, identity, stop
        model.prepare(compute_again=settings.checkpoint_activations, compiled=settings.compile)
        network = comm.replicate(model, dist_info)
        self.forward_backward = ForwardBackward(network, optimizer, normalise=normalise, settings=settings, dist_info=dist_info, mix=mix)
        self.scaler = self.forward_backward.scaler
        self.ema = Ema(model, settings.ema) if settings.ema is not None else None
        self.state = TrainState()
        self.total_steps = settings.epochs * steps_per_epoch  # of the schedule
        self.end_step = min(self.total_steps, settings.max_steps or self.total_steps)  # of this run
        self.checkpointer = Checkpointer(folder)
        self.metrics = MetricBuffer()
        self.logger = MetricLogger(folder, hyperparameters)
        self.progress = StepProgress(total=self.end_step, shown=dist_info.is_main)
        self.profiler = profiler(folder / "profile", settings.profile if dist_info.is_main else 0)
        self.data_wait = DataWait()
        self.reported_bad: set[str] = set()  # messages about bad videos, each of which is logged once
        self.stop_signal = comm.DelayedMax()

    def run(self) -> None:
        """Train to the last step. The checkpoints that were saved stay, whatever ends the training.

        Raises:
            FloatingPointError: the loss became NaN or infinite; no such state is saved.
            Interrupted: a signal came, and the state is saved.
        """
        self.resume()
        if self.dist_info.is_main:
            self.logger.open(step=self.state.step, evaluated=self.state.evaluated)
        self.progress.start(self.state.step)
        try:
            if self.state.step == 0:
                self.calibrate()
            elif self.state.evaluated < self.state.step:  # the end of an epoch was interrupted
                self.finish_epoch((self.state.step - 1) // self.steps_per_epoch)
            with sync_batchnorm(self.model) if self.settings.sync_batch_norm else nullcontext(), self.profiler or nullcontext():
                while self.state.step < self.end_step:
                    epoch = self.state.step // self.steps_per_epoch
                    self.stop_if_signalled(epoch)  # the validation may have taken long
                    self.train_epoch(epoch)
                    self.finish_epoch(epoch)
            self.wait_for_checkpoints()
            self.logger.end()
        finally:
            self.progress.close()
            self.checkpointer.close()
            self.logger.close()

    def calibrate(self) -> None:
        """Calibrate the SGS layers on training clips."""
        clips = self.statistics_clips(0)
        calibrate_layers(self.model, lambda: self.normalised(clips), untrained=True)

    def train_epoch(self, epoch: int) -> None:
        """Train for the remaining steps of an epoch."""
        self.model.train()
        began = time.perf_counter()
        batches = self.batches(epoch, self.state.step % self.steps_per_epoch)
        for number, batch in enumerate(prefetched(batches, self.dist_info.device)):
            data_s = time.perf_counter() - began
            try:
                self.train_step(batch, epoch=epoch, data_s=data_s)
            except NonFiniteFeatures as error:
                self.metrics.check(self.state.step, scaled=self.scaler.is_enabled())  # an earlier loss that is not finite is the cause
                raise FloatingPointError(f"step {self.state.step + 1}: {error}; {REMEDY} (clips: {shortened(batch.paths)})") from error
            self.checkpointer.check()
            if self.profiler:
                self.profiler.step()
            if self.state.step == self.end_step:
                break
            self.stop_if_signalled(epoch)
            if self.settings.save_every and self.state.step % self.settings.save_every == 0:
                self.log_metrics(epoch)
                self.save(self.checkpointer.last, keep=self.settings.keep)
            if number > 0:  # the first batch of an epoch waits for the workers to start
                self.data_wait.add(waited=data_s, total=time.perf_counter() - began)
                # Only after log_metrics, which waits for the device: otherwise, the steps of a GPU seem to take no time.
                if self.dist_info.is_main and self.state.step % self.settings.log_every == 0:
                    self.data_wait.warn(self.settings)
            began = time.perf_counter()
        self.log_metrics(epoch)

    def finish_epoch(self, epoch: int) -> None:
        """Save, validate every `eval_every` epochs, and save again. Does nothing within an epoch unless the run ends there.

        A run that `max_steps` ends is always validated. If that validation is not due, `last.pt` does not contain it: a run
        that resumes to do the remaining steps continues as if it had not taken place.
        """
        whole, ends = self.state.step % self.steps_per_epoch == 0, self.state.step >= self.end_step
        if not (whole or ends):
            return
        self.save(self.checkpointer.last, keep=self.settings.keep)  # first: an error in the validation must not cost training
        due = self.state.step >= self.total_steps or (whole and (epoch + 1) % self.settings.eval_every == 0)
        if due or ends:
            with self.ema.applied_to(self.model) if self.ema else nullcontext():
                self.evaluate(epoch, due=due)
        else:
            self.progress.line(f"epoch {epoch + 1}/{self.settings.epochs} step {self.state.step}")
        if due or not ends:
            self.state.evaluated = self.state.step
            self.save(self.checkpointer.last, keep=self.settings.keep)

    def evaluate(self, epoch: int, *, due: bool) -> None:
        """Refresh the statistics, validate, and save `best.pt` if the result is the best so far.

        If the validation is not due, the previous `best.pt` is kept too, for a run that resumes.
        """
        if self.settings.statistics_clips:
            clips = self.statistics_clips(epoch)
            refresh_statistics(self.model, lambda: self.normalised(clips))
        else:
            comm.broadcast_buffers(self.model)  # each rank has running averages of its own clips
        validation = self.validate()
        values = validation.metrics
        self.model.train()
        self.progress.line(f"epoch {epoch + 1}/{self.settings.epochs} step {self.state.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()))
        self.logger.write_validation(validation, step=self.state.step, epoch=epoch)
        if values["top1"] > self.state.best_top1:
            self.state.best_top1 = values["top1"]
            self.save(self.checkpointer.best, keep=1 if due else 2)

    def train_step(self, batch: ClipBatch, *, epoch: int, data_s: float) -> None:
        """Do one optimizer step on a global batch, after waiting `data_s` seconds for it."""
        began = time.perf_counter()
        settings = self.settings
        # Dropout depends on seed, step and rank alone, so a resume needs no generator state.
        # (torch.manual_seed on a machine without a GPU records a stack trace for each call.)
        generator = torch.default_generator if self.dist_info.device.type == "cpu" else torch
        generator.manual_seed(hash((settings.seed, self.state.step, self.dist_info.rank)) % 2**63)
        draw_keep_ratios(self.model, seed=settings.seed, step=self.state.step)
        self.set_learning_rate()
        buffers = [b.clone() for b in self.model.buffers()] if settings.skip_nonfinite else []
        result = self.forward_backward(batch, self.state.step)
        skipped = settings.skip_nonfinite > 0 and self.skip_nonfinite_step(result, batch, buffers)
        if not skipped:
            self.scaler.step(self.optimizer)
            steer_widths(self.model, result.sampled)
            if self.ema:
                self.ema.update()
        if result.bins:
            self.scaler.update()
        self.state.step += 1
        for message in batch.bad:
            if message not in self.reported_bad:  # the video comes back in every epoch
                log.warning("replaced in training: %s", message)
                self.reported_bad.add(message)
        if not skipped:
            names = ("bins", *(f"bins_{key}" for key in list(self.model.sgs)[1:]))
            means = {name: sum(layer) / len(layer) for name, layer in zip(names, zip(*result.bins))}
            seconds = {"data_s": data_s, "step_s": time.perf_counter() - began}
            self.metrics.add(
                result.loss, result.norm, batch.paths, accuracy=result.accuracy, glance_loss=result.glance_loss, **seconds, **means, replaced=len(batch.bad)
            )  # fmt: skip
        self.progress.step()
        if self.state.step % settings.log_every == 0:
            self.log_metrics(epoch)

    def skip_nonfinite_step(self, result: BatchResult, batch: ClipBatch, buffers: list[Tensor]) -> bool:
        """Return whether to skip the step because its loss or gradient is not finite on some rank. If so, restore the buffers.

        Raises:
            FloatingPointError: more than `skip_nonfinite` steps in a row.
        """
        state, finite = self.state, result.loss.isfinite()
        if not self.scaler.is_enabled():  # which handles gradients that are not finite
            finite &= result.norm.isfinite()
        if not comm.summed((~finite).float()).item():
            state.skipped_in_a_row = 0
            return False
        state.skipped_in_a_row += 1
        clips = f"(clips of this rank: {shortened(batch.paths)})"
        if state.skipped_in_a_row > self.settings.skip_nonfinite:
            raise FloatingPointError(f"step {state.step + 1} is number {state.skipped_in_a_row} in a row with a loss or gradient that is not finite; {REMEDY} {clips}")
        state.skipped += 1
        log.warning("step %d skipped: the loss is %s, the norm of the gradient %s %s", state.step + 1, result.loss.item(), result.norm.item(), clips)
        with torch.no_grad():
            for buffer, before in zip(self.model.buffers(), buffers):
                buffer.copy_(before)
        return True

    def set_learning_rate(self) -> None:
        factor = self.learning_rate_factor(self.state.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group.setdefault("base_lr", group["lr"]) * factor

    def log_metrics(self, epoch: int) -> None:
        """Log the means of the steps since the last call. This is the one wait for the device.

        All ranks call this at the same steps. A loss that is not finite on one of them is an error on all of them, before a
        checkpoint with it is saved.
        """
        if not self.metrics.paths:
            return
        values = self.metrics.means(self.dist_info)
        self.metrics.check(self.state.step, scaled=self.scaler.is_enabled())
        self.metrics = MetricBuffer()
        if self.settings.skip_nonfinite:
            values["skipped"] = self.state.skipped
        values |= learning_rates(self.optimizer)
        values["clips_per_second"] = values.pop("steps_per_second") * self.settings.batch_size
        values |= memory_in_use(self.dist_info.device)
        for key, layer in self.model.sgs.items():
            if layer.tracks_width:
                values["sgs_width" if len(self.model.sgs) == 1 else f"sgs_width_{key}"] = layer.width.item()
        self.progress.report(
            f"loss {values['loss']:.3f} lr {values['lr']:.2g} B' {values['bins']:.1f} data {values['data_s'] * 1e3:.0f}/{values['step_s'] * 1e3:.0f} ms"
        )
        self.logger.write(step=self.state.step, epoch=epoch, split="train", values=values)

    def stop_if_signalled(self, epoch: int) -> None:
        """Save and raise Interrupted if a signal came. All ranks do so after the same step, several ranks one call later."""
        number = 0 if self.stop is None else self.stop_signal.largest(self.stop.signal or 0)
        if number:
            self.log_metrics(epoch)
            self.save(self.checkpointer.last, keep=self.settings.keep)
            self.wait_for_checkpoints()
            raise Interrupted(number, f"after step {self.state.step} of {self.end_step}, saved in {self.checkpointer.last}")

    def statistics_clips(self, epoch: int) -> list[Tensor]:
        """Load the training clips for calibration and precise batch norm."""
        batches = self.until_signalled(self.batches(epoch, 0), statistics_batches(self.settings))
        return clips_for_statistics(batches, self.settings)

    def normalised(self, clips: list[Tensor]) -> Iterator[Tensor]:
        for batch in self.until_signalled(clips, len(clips)):
            yield self.normalise(batch.to(self.dist_info.device))

    def until_signalled(self, items: Iterable[T], total: int) -> Iterator[T]:
        """Iterate over equally many items on all ranks; raise Interrupted on all of them if a signal came. The state is saved already."""
        for item in watched(items, "statistics", unit="batch", total=total, shown=self.dist_info.is_main):
            comm.stop_together(self.stop, f"in the statistics after step {self.state.step}")
            yield item

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "steps_per_epoch": self.steps_per_epoch,
            **self.state.state_dict(),
            **({"ema": self.ema.state_dict()} if self.ema else {}),
            **self.identity,
        }

    def save(self, path: Path, *, keep: int) -> None:
        """Save a checkpoint in the background on the main rank; `keep` as for `checkpoint.save`."""
        if self.dist_info.is_main:
            self.checkpointer.save(self.state_dict(), path, keep=keep)

    def wait_for_checkpoints(self) -> None:
        """Wait on all ranks until every checkpoint is written."""
        self.checkpointer.wait()
        comm.barrier()

    def resume(self) -> None:
        """Load the newest checkpoint that is not damaged, unless there is none or `trainer.resume` is off.

        Raises:
            ValueError: all checkpoints are damaged, they belong to other data or another network, or ranks see different ones.
        """
        state, path = self.checkpointer.load_last() if self.settings.resume and self.checkpointer.last.exists() else (None, None)
        found = {"file": str(path), **({key: state[key] for key in ("step", "evaluated", "steps_per_epoch")} if state else {})}
        comm.require_same(found, of="checkpoints to resume from", remedy=f"{self.folder} must be on a disk that all machines share")
        if state is None or path is None:
            return
        self.identity = checked_identity(state, self.identity, of=path, way_out=way_out(self.folder), warn=self.dist_info.is_main)
        if state["steps_per_epoch"] != self.steps_per_epoch:
            raise ValueError(
                f"the training list changed since {path} was written ({state['steps_per_epoch']} steps an epoch then, {self.steps_per_epoch} now); {way_out(self.folder)}"
            )
        checkpoint.load_weights(self.model, state["model"], path)
        load_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.state.load_state_dict(state)
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        comm.barrier()  # every rank has read the file
        if self.dist_info.is_main:
            self.checkpointer.continue_from(path)
        if self.state.step > self.end_step:
            log.info("%s is at step %d already, and trainer.max_steps=%d: nothing to train", path, self.state.step, self.end_step)
        elif self.state.step < self.end_step:  # at the end there is nothing to resume, and the program says that the training is complete
            log.info("resuming %s at step %d of %d", path, self.state.step, self.end_step)
