"""Forward and backward passes of a training step."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from atfr.data.mixup import Mix
from atfr.data.types import ClipBatch
from atfr.engine.distributed.comm import DistInfo
from atfr.engine.optim import clip_gradients
from atfr.engine.settings import TrainerSettings, precision_dtype
from atfr.models.sgs.sampling import NonFiniteFeatures, Sampled
from atfr.models.video_net import Sampling


@dataclass
class BatchResult:
    """What the passes over a batch of this rank gave."""

    loss: Tensor  # scalar; its mean over the ranks is the mean loss of the global batch
    norm: Tensor  # scalar, norm of the gradients before they were clipped
    accuracy: Tensor | None = None  # [2] top-1 and top-5 in percent, their means over the ranks as that of the loss; None with mixed clips
    glance_loss: Tensor | None = None  # scalar like `loss`: what embedding=glance is trained by, see `Sampling.glance_loss`
    sampled: list[tuple[Sampled, ...]] = field(default_factory=list)  # one tuple for each part of the batch, one item a layer
    bins: list[tuple[int, ...]] = field(default_factory=list)  # B' of each clip, one number a layer


class ForwardBackward:
    """Computes the clipped gradients of a batch, in `accumulate` parts, with autocast and loss scaling.

    Args:
        network: the model, wrapped to average gradients where there are several ranks.
        normalise: converts clips from uint8 to the network's input.
        mix: mixup or CutMix, called with clips, labels and step; None: off.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        normalise: nn.Module,
        settings: TrainerSettings,
        dist_info: DistInfo,
        mix: Mix | None = None,
    ) -> None:
        self.network, self.optimizer, self.normalise, self.mix = network, optimizer, normalise, mix
        self.settings, self.dist_info = settings, dist_info
        self.parameters = list(network.parameters())
        self.loss = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
        self.dtype = precision_dtype(settings.precision, dist_info.device)
        self.scaler = torch.amp.GradScaler(dist_info.device.type, enabled=self.dtype == torch.float16)

    def __call__(self, batch: ClipBatch, step: int) -> BatchResult:
        """Leave the gradients of the global batch in the parameters. The loss is NaN if the step has to be skipped.

        Raises:
            NonFiniteFeatures: features are NaN or infinite, and `skip_nonfinite` is off.
        """
        try:
            return self._run(batch, step)
        except NonFiniteFeatures:
            if not self.settings.skip_nonfinite:
                raise
            return BatchResult(torch.tensor(math.nan), torch.tensor(math.nan))

    def _run(self, batch: ClipBatch, step: int) -> BatchResult:
        device, world = self.dist_info.device, self.dist_info.world
        clips = self.normalise(batch.clips.to(device, non_blocking=True))  # [N, C, T, H, W]
        targets = batch.labels.to(device, non_blocking=True)  # [N]
        if self.mix is not None:
            clips, targets = self.mix(clips, targets, step)  # targets: [N, classes]
        self.optimizer.zero_grad(set_to_none=True)
        total, hits, sampled, bins = torch.zeros((), device=device), torch.zeros(2, device=device), [], []
        glance_losses: list[Tensor] = []  # of the parts
        parts = list(zip(clips.chunk(self.settings.accumulate), targets.chunk(self.settings.accumulate)))
        for number, (part, part_targets) in enumerate(parts, start=1):
            # Gradients are averaged over the ranks once, with the last part.
            with self.network.no_sync() if world > 1 and number < len(parts) else nullcontext():
                logits, sampling, factor = self._predict(part)
                # The mean over the ranks is the mean over the global batch, even if parts or ranks have unequal numbers of clips.
                share = factor * len(part) * world / self.settings.batch_size
                loss = self.loss(logits.float(), part_targets) * share
                glance_loss = sampling.glance_loss(self.loss, part_targets) * share
                self.scaler.scale(loss + glance_loss).backward()
            total += loss.detach()
            if isinstance(glance_loss, Tensor):  # not 0.0, which no layer with such an embedding gives
                glance_losses.append(glance_loss.detach())
            if self.mix is None:
                hits += top_hits(logits.detach(), part_targets)
            sampled.append(sampling.layers)
            bins += sampling.bins
        self.scaler.unscale_(self.optimizer)
        accuracy = hits * (100 * world / self.settings.batch_size) if self.mix is None else None
        glance_total = torch.stack(glance_losses).sum() if glance_losses else None
        return BatchResult(total, clip_gradients(self.parameters, self.settings.clip_norm), accuracy, glance_total, sampled, bins)

    def _predict(self, clips: Tensor) -> tuple[Tensor, Sampling, float]:
        """Return logits, what the SGS layers did, and a factor for the loss: 1, or NaN if the step has to be skipped."""
        factor = 1.0
        with torch.autocast(self.dist_info.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            try:
                logits, sampling = self.network(clips, return_sampling=True)
            except NonFiniteFeatures:
                if not self.settings.skip_nonfinite or self.dist_info.world == 1:
                    raise
                # The other ranks wait for this rank's gradients. Zeros give some, before all ranks skip the step.
                logits, sampling = self.network(torch.zeros_like(clips), return_sampling=True)
                factor = math.nan
        return logits, sampling, factor


def top_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Count the clips whose label [N] is the largest, and among the five largest, of their logits [N, classes]. Returns [2] on their device."""
    hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # [N, 5]
    return torch.stack([hits[:, 0].sum(), hits.sum()])
