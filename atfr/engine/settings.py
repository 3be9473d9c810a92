"""Options of training and evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """Options of training and evaluation (`configs/trainer/`)."""

    output_dir: str | None  # the run folder; None: a folder in runs/ named after the overrides
    batch_size: int  # clips in a global batch, over all ranks
    epochs: int
    max_steps: int | None  # end the run after this number of optimizer steps; the schedule still spans all epochs
    seed: int
    accelerator: str  # auto | cpu | cuda
    devices: int | None  # number of ranks; None: as many as the launcher started
    precision: str  # auto (bf16 on a GPU that has it) | fp32 | bf16 | fp16
    workers: int  # loader processes per rank
    timeout_s: int  # seconds to wait for a batch, or without workers for a video; 0: no limit
    label_smoothing: float
    clip_norm: float | None  # largest gradient norm; None: no clipping
    statistics_clips: int  # training clips for precise batch norm and the SGS width; 0: running averages
    eval_every: int  # epochs between validations; the last epoch always has one
    save_every: int  # steps between checkpoints inside an epoch; 0: at the end of each epoch only
    log_every: int  # steps between log lines
    resume: bool  # resume from checkpoints/last.pt if the run folder has one
    test: bool  # test the best checkpoint after training
    keep: int = 2  # newest checkpoints to keep: last.pt, last-1.pt, ...
    class_balanced: bool = False  # each class equally often in an epoch
    accumulate: int = 1  # parts of a rank's batch that run one after the other
    sync_batch_norm: bool = False  # batch norm over the clips of all ranks
    checkpoint_activations: bool = False  # recompute activations in the backward pass
    compile: bool = False  # torch.compile, in training and evaluation
    ema: float | None = None  # decay of the averaged weights, which are then validated and tested; None: off
    skip_nonfinite: int = 0  # largest number of steps in a row to skip; 0: such a step is an error
    overfit_batches: int = 0  # number of batches to train on over and over; 0: off
    profile: int = 0  # number of steps to trace; 0: off
    deterministic: bool = False  # deterministic algorithms only
    tf32: bool = False  # TF32 for float32 matrix products and convolutions on a GPU
    mixup: float | None = None  # alpha of its Beta distribution; None: off
    cutmix: float | None = None
    tensorboard_pictures: int = 4  # validation clips that TensorBoard shows; 0: no pictures at all
    examples: int = 2  # test clips of each kind that are drawn in examples/; 0: none

    def __post_init__(self) -> None:
        at_least_one = ("batch_size", "epochs", "max_steps", "eval_every", "log_every", "keep", "accumulate")
        at_least_zero = ("seed", "workers", "statistics_clips", "save_every", "timeout_s", "skip_nonfinite", "overfit_batches", "profile", "tensorboard_pictures", "examples")
        for name in at_least_one + at_least_zero:
            value, least = getattr(self, name), int(name in at_least_one)
            if value is not None and not value >= least:
                raise ValueError(f"trainer.{name} must be at least {least}, not {value}")
        for name in ("mixup", "cutmix"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"trainer.{name} must be above 0 or null, not {getattr(self, name)}")
        if self.compile and self.sync_batch_norm:
            raise ValueError("trainer.compile=true does not work with trainer.sync_batch_norm=true: set one of them to false")
        if self.compile and self.checkpoint_activations:
            raise ValueError("trainer.compile=true decides itself which activations to recompute: set trainer.checkpoint_activations to false")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"trainer.ema must be above 0 and below 1 or null, not {self.ema}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"trainer.label_smoothing must be at least 0 and below 1, not {self.label_smoothing}")
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ValueError(f"trainer.clip_norm must be above 0 or null, not {self.clip_norm}")


def precision_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the autocast dtype for `trainer.precision`; float32 means no autocast.

    Raises:
        ValueError: an unknown precision, or fp16 on the CPU.
    """
    choices = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if precision not in choices:
        raise ValueError(f"trainer.precision={precision!r} does not exist; choose one of auto, {', '.join(choices)}")
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("trainer.precision=fp16 needs a GPU; on the CPU choose fp32 or bf16")
    return choices[precision]
