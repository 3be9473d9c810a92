"""Training: the loop, and what it takes to stop and go on."""

from __future__ import annotations

import logging
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, TypeVar

import torch
from torch import Tensor, nn

from atfr.data.mixup import Mix
from atfr.engine.calibration import calibrate_width, clips_for_statistics, draw_shares, refresh_statistics, statistics_batches, steer_width
from atfr.engine.data_wait import DataWait
from atfr.engine.distributed import comm
from atfr.engine.distributed.comm import DistInfo
from atfr.engine.distributed.preemption import Interrupted, StopFlag
from atfr.engine.distributed.sync_batchnorm import sync_batchnorm
from atfr.engine.ema import Ema
from atfr.engine.optim import clip_gradients
from atfr.engine.run import checkpoint
from atfr.engine.run.contents import same_contents
from atfr.engine.run.metric_buffer import REMEDY, MetricBuffer, some
from atfr.engine.run.metric_logger import RunLog
from atfr.engine.run.profiler import profiler
from atfr.engine.run.run_dir import way_out
from atfr.engine.run.saving import Saver
from atfr.engine.settings import TrainerSettings, precision_dtype
from atfr.models.sgs.layer import NonFiniteFeatures
from atfr.models.video_net import Prediction, VideoNet
from atfr.utils.progress import StepProgress, watched

log = logging.getLogger(__name__)
T = TypeVar("T")


class Training:
    """One run's moving parts. `run` goes from wherever the run folder left off to the last step.

    Args:
        model: the network, on the ranks' device already.
        batches: gives the training batches of an epoch from its n-th on: `batches(epoch, n)`.
        steps_per_epoch: how many there are in a whole epoch.
        validate: measures the model on the validation split and returns its values; `top1` decides
            which checkpoint is the best.
        learning_rate_factor: (step, total steps) -> what to multiply the base rate with.
        stop: true once training is to save and end, asked after each step; None: never.
        mix: blends a batch's clips and labels at a step (`mixing`); None: as they are.
        identity: plain data kept in every checkpoint (config, class names, and `contents` of the files).
    """

    def __init__(
        self,
        *,
        model: VideoNet,
        optimizer: torch.optim.Optimizer,
        learning_rate_factor: Callable[[int, int], float],
        batches: Callable[[int, int], Iterable[Any]],
        steps_per_epoch: int,
        validate: Callable[[], dict[str, float]],
        normalise: nn.Module,
        settings: TrainerSettings,
        dist_info: DistInfo,
        folder: Path,
        identity: Mapping[str, Any],
        mix: Mix | None = None,
        stop: StopFlag | None = None,
    ) -> None:
        self.model, self.optimizer, self.factor = model, optimizer, learning_rate_factor
        self.parameters = list(model.parameters())
        self.batches, self.steps_per_epoch, self.validate = batches, steps_per_epoch, validate
        self.normalise, self.settings, self.dist_info = normalise, settings, dist_info
        self.folder, self.identity, self.mix, self.stop = folder, identity, mix, stop
        model.prepare(compute_again=settings.checkpoint_activations, compiled=settings.compile)
        self.last, self.best = folder / "checkpoints" / "last.pt", folder / "checkpoints" / "best.pt"
        self.total_steps = settings.epochs * steps_per_epoch  # of the whole schedule
        self.end_step = min(self.total_steps, settings.max_steps or self.total_steps)  # of this run
        self.dtype = precision_dtype(settings.precision, dist_info.device)
        self.scaler = torch.amp.GradScaler(dist_info.device.type, enabled=self.dtype == torch.float16)
        self.loss = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
        self.step, self.evaluated, self.best_top1 = 0, 0, -1.0
        self.skipped, self.skipped_in_a_row = 0, 0
        self.ema = Ema(model, settings.ema) if settings.ema is not None else None
        self.pending = MetricBuffer()
        self.told = comm.DelayedMax()
        self.data_wait = DataWait()
        self.named: set[str] = set()  # the bad videos that were told of

    def run(self) -> None:
        """Train to the last step. Whatever was saved before stays, however this ends.

        Raises:
            FloatingPointError: the loss became NaN or infinite; nothing of it is saved.
            Interrupted: it was told to stop, and has saved.
        """
        self.resume()
        self.log = RunLog(self.folder, resume_step=self.step, evaluated=self.evaluated) if self.dist_info.is_main else None
        self.network = comm.replicate(self.model, self.dist_info)
        self.saver = Saver()
        self.progress = StepProgress(first=self.step, total=self.end_step, shown=self.dist_info.is_main)
        try:
            if self.step == 0:
                clips = self.clips_for_statistics(0)
                calibrate_width(self.model, lambda: self._normalised(clips), untrained=True)
            elif self.evaluated < self.step:
                self.end_epoch((self.step - 1) // self.steps_per_epoch)  # where the epoch's end was interrupted
            batch_norm = sync_batchnorm(self.model) if self.settings.sync_batch_norm else nullcontext()
            with batch_norm, profiler(self.folder / "profile", self.settings.profile if self.dist_info.is_main else 0) as self.profile:
                while self.step < self.end_step:
                    epoch = self.step // self.steps_per_epoch
                    self.stop_if_told(epoch)  # a validation may have taken long
                    self.train_epoch(epoch)
                    self.end_epoch(epoch)
            self.saved()
        finally:
            self.progress.close()
            self.saver.close()
            if self.log:
                self.log.close()

    def train_epoch(self, epoch: int) -> None:
        """The rest of an epoch."""
        self.model.train()
        waiting = time.perf_counter()
        for number, batch in enumerate(self.batches(epoch, self.step % self.steps_per_epoch)):
            data_s = time.perf_counter() - waiting
            try:
                self.train_step(batch, epoch=epoch, data_s=data_s)
            except NonFiniteFeatures as error:
                self.pending.check(self.step, scaled=self.scaler.is_enabled())  # if the loss was the first to go, that is what to say
                raise FloatingPointError(f"step {self.step + 1}: {error}; {REMEDY} (clips: {some(batch.paths)})") from error
            self.saver.check()
            if self.profile:
                self.profile.step()
            if self.step == self.end_step:
                break
            self.stop_if_told(epoch)
            if self.settings.save_every and self.step % self.settings.save_every == 0:
                self.check_losses(epoch)
                self.save(self.last)
            if number > 0:  # the first batch of an epoch comes with the start of the workers
                self.check_data_wait(waited=data_s, total=time.perf_counter() - waiting)
            waiting = time.perf_counter()
        self.check_losses(epoch)

    def stop_if_told(self, epoch: int) -> None:
        """Save and end, all processes at the same step, if one of them was told to: of several, at the next call."""
        number = 0 if self.stop is None else self.told.largest(self.stop.signal or 0)
        if number:
            self.check_losses(epoch)
            self.save(self.last)
            self.saved()
            raise Interrupted(number, f"after step {self.step} of {self.end_step}, saved in {self.last}")

    def until_told(self, items: Iterable[T], total: int) -> Iterator[T]:
        """The items, as many on every process; between them all end if one was told to: what was trained is saved already."""
        for item in watched(items, "statistics", unit="batch", total=total, shown=self.dist_info.is_main):
            comm.stop_together(self.stop, f"in the statistics after step {self.step}")
            yield item

    def check_data_wait(self, *, waited: float, total: float) -> None:
        """Count a step, and warn if too much of the time goes to waiting."""
        self.data_wait.add(waited=waited, total=total)
        # Only where the device has been waited for: in between, a GPU's steps seem to take no time.
        if self.dist_info.is_main and self.step % self.settings.log_every == 0:
            warning = self.data_wait.warning(self.settings)
            if warning:
                log.warning("%s", warning)

    def end_epoch(self, epoch: int) -> None:
        """Save, validate if it is time, and save again. Does nothing in the middle of an epoch, unless this run ends there.

        A validation that is due only since `max_steps` ends the run leaves no trace in `last.pt`, from which the rest
        of the steps goes on as if there had been none.
        """
        whole, ends = self.step % self.steps_per_epoch == 0, self.step >= self.end_step
        if not (whole or ends):
            return
        self.save(self.last)  # first, so that whatever goes wrong in the validation costs no training
        due = self.step >= self.total_steps or (whole and (epoch + 1) % self.settings.eval_every == 0)
        if due or ends:
            with self.ema.in_place(self.model) if self.ema else nullcontext():
                self.evaluate(epoch, due=due)
        else:
            self.progress.line(f"epoch {epoch + 1}/{self.settings.epochs} step {self.step}")
        if due or not ends:
            self.evaluated = self.step
            self.save(self.last)

    def train_step(self, batch: Any, *, epoch: int, data_s: float) -> None:
        """One optimizer step on one global batch."""
        began = time.perf_counter()
        # Dropout draws from a generator that depends on the step alone: nothing to save for a resume.
        # (torch.manual_seed notes for a GPU that is not there, too, where it was called from.)
        seeded = torch.default_generator if self.dist_info.device.type == "cpu" else torch
        seeded.manual_seed(hash((self.settings.seed, self.step, self.dist_info.rank)) % 2**63)
        draw_shares(self.model, seed=self.settings.seed, step=self.step)
        self.set_learning_rate()
        buffers = [b.clone() for b in self.model.buffers()] if self.settings.skip_nonfinite else []
        try:
            loss, norm, parts = self.gradients(batch)
        except NonFiniteFeatures:
            if not self.settings.skip_nonfinite:
                raise
            loss, norm, parts = torch.tensor(math.nan), torch.tensor(math.nan), []
        skipped = bool(self.settings.skip_nonfinite) and self.skips(loss, norm, batch, buffers)
        if not skipped:
            self.scaler.step(self.optimizer)
            steer_width(self.model, [part.sampled for part in parts])
            if self.ema:
                self.ema.update()
        if parts:
            self.scaler.update()
        self.step += 1
        for message in batch.bad:
            if message not in self.named:  # it comes again every epoch, and there may be thousands
                log.warning("replaced in training: %s", message)
                self.named.add(message)
        if not skipped:
            names = ("bins", *(f"bins_{key}" for key in list(self.model.sgs)[1:]))
            kept = {name: sum(bins) / len(bins) for name, bins in zip(names, zip(*(clip for part in parts for clip in part.bins)))}
            self.pending.add(loss, norm, batch.paths, **kept, replaced=len(batch.bad), data_s=data_s, step_s=time.perf_counter() - began)
        self.progress.step()
        if self.step % self.settings.log_every == 0:
            self.check_losses(epoch)

    def gradients(self, batch: Any) -> tuple[Tensor, Tensor, list[Prediction]]:
        """This process's addend of the mean loss, with its clipped gradient left in the parameters; the gradient's norm; the predictions of each part."""
        clips = self.normalise(batch.clips.to(self.dist_info.device, non_blocking=True))
        targets = batch.labels.to(self.dist_info.device, non_blocking=True)
        if self.mix is not None:
            clips, targets = self.mix(clips, targets, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        parts, total = [], torch.zeros((), device=self.dist_info.device)
        pieces = list(zip(clips.chunk(self.settings.accumulate), targets.chunk(self.settings.accumulate)))
        for number, (part, wanted) in enumerate(pieces, start=1):
            # Gradients are averaged over the processes once, with the last part.
            waits = self.dist_info.world > 1 and number < len(pieces)
            with self.network.no_sync() if waits else nullcontext():
                prediction, counts = self.predict(part)
                # The mean over the global batch, once averaged over processes: parts, and the shares of processes, may be of different sizes.
                loss = self.loss(prediction.logits.float(), wanted) * (counts * len(part) * self.dist_info.world / self.settings.batch_size)
                self.scaler.scale(loss).backward()
            total += loss.detach()
            parts.append(prediction)
        self.scaler.unscale_(self.optimizer)
        return total, clip_gradients(self.parameters, self.settings.clip_norm), parts

    def predict(self, clips: Tensor) -> tuple[Prediction, float]:
        """The network's forward pass, and what to multiply its loss with: 1, or NaN if the step has to be left out."""
        with torch.autocast(self.dist_info.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            try:
                return self.network(clips), 1.0
            except NonFiniteFeatures:
                if not self.settings.skip_nonfinite or self.dist_info.world == 1:
                    raise
                # The others wait for this one's gradients, of whatever clips, before all of them leave the step out.
                return self.network(torch.zeros_like(clips)), math.nan

    def skips(self, loss: Tensor, norm: Tensor, batch: Any, buffers: list[Tensor]) -> bool:
        """Whether this step's loss or gradient is not finite on some process: all of them leave it out, and it leaves no trace.

        Raises:
            FloatingPointError: it is one more in a row than may be.
        """
        infinite = ~loss.isfinite() if self.scaler.is_enabled() else ~(loss.isfinite() & norm.isfinite())  # fp16 scaling deals with gradients
        if not comm.summed(infinite.float()).item():
            self.skipped_in_a_row = 0
            return False
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.settings.skip_nonfinite:
            raise FloatingPointError(
                f"step {self.step + 1}: the {self.skipped_in_a_row}th step in a row with a loss or gradient that is not finite; {REMEDY}"
                f" (clips of this process: {some(batch.paths)})"
            )
        self.skipped += 1
        log.warning("step %d left out: the loss is %s, the gradient's norm %s (clips of this process: %s)", self.step + 1, loss.item(), norm.item(), some(batch.paths))
        with torch.no_grad():
            for buffer, before in zip(self.model.buffers(), buffers):
                buffer.copy_(before)
        return True

    def check_losses(self, epoch: int) -> None:
        """Fetch the losses since the last check (the one wait for the device) and log their means.

        All processes come here at the same steps, and a loss that is not finite on one of them
        stops them all, before anything of it is saved.
        """
        if not self.pending.losses:
            return
        values = self.pending.means(self.dist_info)
        self.pending.check(self.step, scaled=self.scaler.is_enabled())
        self.pending = MetricBuffer()
        if self.settings.skip_nonfinite:
            values["skipped"] = self.skipped
        values["lr"] = self.optimizer.param_groups[0]["lr"]
        for key, layer in self.model.sgs.items():
            if layer.tracks_width:
                values["sgs_width" if len(self.model.sgs) == 1 else f"sgs_width_{key}"] = layer.width.item()
        self.progress.report(
            f"loss {values['loss']:.3f} lr {values['lr']:.2g} B' {values['bins']:.1f} data {values['data_s'] * 1e3:.0f}/{values['step_s'] * 1e3:.0f} ms"
        )
        if self.log:
            self.log.write(step=self.step, epoch=epoch, split="train", values=values)

    def evaluate(self, epoch: int, *, due: bool) -> None:
        """Refresh the statistics, validate, and keep the checkpoint if it is the best so far.

        If the validation was not due, the best checkpoint of those that were stays beside it until the run goes on.
        """
        if self.settings.statistics_clips:
            clips = self.clips_for_statistics(epoch)
            refresh_statistics(self.model, lambda: self._normalised(clips))
        else:
            comm.broadcast_buffers(self.model)  # each process has the running averages of its own clips
        values = self.validate()
        self.model.train()
        self.progress.line(f"epoch {epoch + 1}/{self.settings.epochs} step {self.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()))
        if self.log:
            self.log.write(step=self.step, epoch=epoch, split="val", values=values)
        if values["top1"] > self.best_top1:
            self.best_top1 = values["top1"]
            self.save(self.best, keep=1 if due else 2)

    def save(self, path: Path, *, keep: int | None = None) -> None:
        """Have everything that a resume needs written, by the main process and while training goes on.

        Args:
            keep: newest states that stay; None: `trainer.keep`.
        """
        if self.dist_info.is_main:
            state = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "step": self.step,
                "evaluated": self.evaluated,
                "steps_per_epoch": self.steps_per_epoch,
                "best_top1": self.best_top1,
                "skipped": self.skipped,
                "skipped_in_a_row": self.skipped_in_a_row,
                **({"ema": self.ema.state_dict()} if self.ema else {}),
                **self.identity,
            }
            self.saver.save(state, path, keep=self.settings.keep if keep is None else keep)

    def saved(self) -> None:
        """Wait until everything is written, on all processes."""
        self.saver.wait()
        comm.barrier()

    def resume(self) -> None:
        """Go on from `last.pt`, if there is one and it was not told otherwise; from the one before it if it is damaged."""
        state, found = checkpoint.load_newest(self.last) if self.settings.resume and self.last.exists() else (None, None)
        start = {"file": str(found), **({key: state[key] for key in ("step", "evaluated", "steps_per_epoch")} if state else {})}
        comm.require_same(start, of="states to go on from", remedy=f"{self.folder} must be on a disk that all machines share")
        if state is None:
            return
        self.identity = same_contents(state, self.identity, of=found, way_out=way_out(self.folder), warn=self.dist_info.is_main)
        if state["class_names"] != self.identity["class_names"] or state["steps_per_epoch"] != self.steps_per_epoch:
            raise ValueError(
                f"the training list or its classes changed since {found} was written ({len(state['class_names'])} classes and"
                f" {state['steps_per_epoch']} steps an epoch then, {len(self.identity['class_names'])} and {self.steps_per_epoch} now);"
                f" {way_out(self.folder)}"
            )
        checkpoint.load_weights(self.model, state["model"], found)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.evaluated, self.best_top1 = state["step"], state["evaluated"], state["best_top1"]
        self.skipped, self.skipped_in_a_row = state.get("skipped", 0), state.get("skipped_in_a_row", 0)
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        comm.barrier()  # every process has read it
        if self.dist_info.is_main:
            checkpoint.go_on_from(found, last=self.last, best=self.best)
        if self.step > self.end_step:
            log.info("%s is at step %d already, and trainer.max_steps=%d: nothing to train", found, self.step, self.end_step)
        else:
            log.info("resuming %s at step %d of %d", found, self.step, self.end_step)

    def set_learning_rate(self) -> None:
        """The schedule's rate for the step that comes."""
        factor = self.factor(self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group.setdefault("base_lr", group["lr"]) * factor

    def clips_for_statistics(self, epoch: int) -> list[Tensor]:
        batches = self.until_told(self.batches(epoch, 0), statistics_batches(self.settings))
        return clips_for_statistics(batches, self.settings)

    def _normalised(self, clips: list[Tensor]) -> Iterator[Tensor]:
        for batch in self.until_told(clips, len(clips)):
            yield self.normalise(batch.to(self.dist_info.device))
