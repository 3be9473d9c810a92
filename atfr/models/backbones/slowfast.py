"""SlowFast (Feichtenhofer et al., ICCV 2019) on pytorchvideo's modules, from one clip tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping

import torch
from pytorchvideo.models.slowfast import FuseFastToSlow, create_slowfast
from torch import Tensor, fx, nn

from atfr.models.backbones.common import mended, variant
from atfr.models.packed import ops
from atfr.models.packed.segments import Segments, take, window_of
from atfr.models.sgs.config import SGSConfig
from atfr.models.video_net import VideoNet

_NAMES = ("stem", "res2", "res3", "res4", "res5")
# Each stage of each pathway, before the fusion; a bare name stands for that stage of both.
STAGES: Mapping[str, str | tuple[str, str]] = {
    **{f"slow.{name}": f"blocks.{i}.multipathway_blocks.0" for i, name in enumerate(_NAMES)},
    **{f"fast.{name}": f"blocks.{i}.multipathway_blocks.1" for i, name in enumerate(_NAMES)},
    **{name: (f"slow.{name}", f"fast.{name}") for name in _NAMES},
}

FUSION_RULES = ("released", "aligned")
Packed = tuple[Tensor, Segments]
Timed = tuple[Tensor, Tensor]  # one clip's features [1, C, B', H, W] and their times [B']


@dataclass(frozen=True)
class Variant:
    """One SlowFast, as in PySlowFast's configs of that name and pytorchvideo's hub."""

    depth: int
    alpha: int  # Fast frames to one Slow frame
    fusion_kernel: int  # of the lateral convolution, in time


SIZES = {
    "4x16-R50": Variant(depth=50, alpha=8, fusion_kernel=5),
    "8x8-R50": Variant(depth=50, alpha=4, fusion_kernel=7),
    "8x8-R101": Variant(depth=101, alpha=4, fusion_kernel=5),
}


def slowfast(
    *, size: str, num_classes: int, dropout: float = 0.5, fusion: str = "aligned", sgs: SGSConfig | None = None
) -> VideoNet:
    """A SlowFast that takes clips [N, 3, T, H, W], T the Fast pathway's frames and a multiple of alpha.

    Parameters have the names of pytorchvideo's `slowfast_r50` and `slowfast_r101`; the head pools
    over all features that each pathway has.

    Args:
        fusion: how Fast features meet Slow ones where SGS changed their numbers (see `Fusion`); the
            dense network is the same with each.

    Raises:
        ValueError: an unknown size or fusion, or options of `sgs` that do not fit (see `VideoNet`).
    """
    chosen = variant(SIZES, size, network="slowfast")
    source = create_slowfast(
        model_depth=chosen.depth,
        model_num_class=num_classes,
        dropout_rate=dropout,
        slowfast_fusion_conv_kernel_size=(chosen.fusion_kernel, 1, 1),
        slowfast_fusion_conv_stride=(chosen.alpha, 1, 1),
        head_pool=nn.AdaptiveAvgPool3d,  # to 1: pytorchvideo's own pools are of one clip size
        head_activation=None,
    )
    return VideoNet(SlowFast(mended(source).blocks, alpha=chosen.alpha, fusion=fusion), stages=STAGES, sgs=sgs)


class SlowFast(nn.Module):
    """pytorchvideo's SlowFast `blocks` on one clip tensor: [N, 3, T, H, W] -> logits [N, classes]."""

    def __init__(self, blocks: nn.ModuleList, *, alpha: int, fusion: str) -> None:
        super().__init__()
        self.pathways = Pathways(alpha)
        self.blocks = blocks
        for stage in blocks:
            if isinstance(getattr(stage, "multipathway_fusion", None), FuseFastToSlow):
                stage.multipathway_fusion = Fusion(stage.multipathway_fusion, rule=fusion)

    def forward(self, clips: Tensor) -> Tensor:
        *stages, pool, head = self.blocks
        slow, fast = self.pathways(clips)
        for stage in stages:
            slow, fast = stage.multipathway_blocks[0](slow), stage.multipathway_blocks[1](fast)
            if isinstance(stage.multipathway_fusion, Fusion):  # res5 has none
                slow = stage.multipathway_fusion(slow, fast)
        return head(pool([slow, fast]))


class Pathways(nn.Module):
    """Clips [N, 3, T, H, W] -> the Slow pathway's T / alpha frames, and all T for the Fast one."""

    def __init__(self, alpha: int) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        return slow_frames(clips, self.alpha), clips


@fx.wrap  # the frames are counted in Python, so tracers have to stop here
def slow_frames(clips: Tensor, alpha: int) -> Tensor:
    """T / alpha frames from the first to the last, those of PySlowFast's `pack_pathway_output`.

    Raises:
        ValueError: T is not a multiple of alpha, so that the lateral convolutions would not give
            as many features as the Slow pathway has.
    """
    frames = int(clips.shape[2])
    if frames % alpha:
        raise ValueError(f"this SlowFast needs clips of a multiple of {alpha} frames, not of {frames}; set dataset.clip.frames")
    # On the CPU, since devices may round differently and a frame is cut to the whole number below.
    chosen = torch.linspace(0, frames - 1, frames // alpha, device="cpu").long()
    return clips.index_select(2, chosen.to(clips.device, non_blocking=True))


class Fusion(nn.Module):
    """The lateral connection: (slow [N, C, T', H, W], fast [N, c, alpha T', H, W]) -> [N, C + 2 c, T', H, W].

    Args:
        source: pytorchvideo's module, whose convolution, norm and activation are taken over with
            their names.
        rule: what happens where SGS has changed the pathways' numbers of features. "released": the
            convolution strides over the kept Fast features, and the shorter of its result and the
            Slow features is padded with zeros, centred, as in the released code. "aligned":
            for each Slow feature the convolution is centred on the Fast feature nearest in time.
            Dense features are fused the same with each.

    Raises:
        ValueError: an unknown rule.
    """

    def __init__(self, source: FuseFastToSlow, *, rule: str = "aligned") -> None:
        super().__init__()
        if rule not in FUSION_RULES:
            raise ValueError(f"model.fusion={rule!r} is not a way to fuse the pathways; choose one of {', '.join(FUSION_RULES)}")
        self.conv_fast_to_slow = source.conv_fast_to_slow
        self.norm = source.norm
        self.activation = source.activation
        self.rule = rule

    def forward(self, slow: Tensor, fast: Tensor) -> Tensor:
        return torch.cat((slow, self._activated(self.conv_fast_to_slow(fast))), 1)

    def packed_forward(self, slow_pathway: Packed, fast_pathway: Packed) -> Packed:
        """Fuse packed features of both pathways."""
        (slow, slow_segments), (fast, fast_segments) = slow_pathway, fast_pathway
        if self.rule == "aligned":
            windows = self._packed_windows(slow_segments, fast_segments, fast)
            fused = self._convolved(fast, windows, as_batch=fast.device.type != "cpu")
            return torch.cat((slow, fused), 1), slow_segments
        fused = self._activated(ops.conv3d(self.conv_fast_to_slow, fast, fast_segments))
        lengths = slow_segments.lengths, fast_segments.after(window_of(self.conv_fast_to_slow)).lengths
        clips = zip(slow.split(lengths[0], dim=2), slow_segments.times.split(lengths[0]), fused.split(lengths[1], dim=2), *lengths)
        features, times = zip(*(_padded(*clip) for clip in clips))
        features = torch.cat(features, 2).contiguous(memory_format=torch.channels_last_3d)
        return features, Segments(tuple(map(max, *lengths)), slow_segments.frames, torch.cat(times))

    def one_clip_forward(self, slow_pathway: Timed, fast_pathway: Timed) -> Timed:
        """Fuse the features of one clip, whose numbers need not be known."""
        (slow, slow_times), (fast, fast_times) = slow_pathway, fast_pathway
        if self.rule == "released":
            fused = self._activated(self.conv_fast_to_slow(fast))
            return _padded(slow, slow_times, fused, slow.shape[2], fused.shape[2])
        fused = self._convolved(fast, self._windows(slow_times, torch.zeros_like(slow_times), fast_times, torch.zeros_like(fast_times), fast.shape[2]))
        torch._check(fused.shape[2] == slow.shape[2])  # torch.export cannot know it
        return torch.cat((slow, fused), 1), slow_times

    def _activated(self, fused: Tensor) -> Tensor:
        return self.activation(self.norm(fused))

    def _packed_windows(self, slow: Segments, fast: Segments, features: Tensor) -> Tensor:
        """Run `_windows` for packed features, in one launch on GPUs."""
        if not ops.kernels_take(features):
            return self._windows(slow.times, slow.owner, fast.times, fast.owner, features.shape[2])
        from atfr.models.packed.kernels.nearest import nearest_windows

        conv = self.conv_fast_to_slow
        return nearest_windows(slow.times, slow.owner, fast.times, fast.starts, float(conv.stride[0]), conv.kernel_size[0])

    def _windows(self, slow_times: Tensor, slow_owner: Tensor, fast_times: Tensor, fast_owner: Tensor, frames: int) -> Tensor:
        """Return the Fast features round the one nearest in time to each Slow one, of the same clip (`owner`): [M_slow, kernel].

        Places beyond the clip are `frames`, M_fast.
        """
        (kernel, *_), (alpha, *_) = self.conv_fast_to_slow.kernel_size, self.conv_fast_to_slow.stride
        distance = (slow_times[:, None] * alpha - fast_times).abs()  # [M_slow, M_fast]
        nearest = distance.masked_fill(slow_owner[:, None] != fast_owner, torch.inf).argmin(dim=1)
        slots = nearest[:, None] + torch.arange(-(kernel // 2), kernel - kernel // 2, device=fast_times.device)  # [M_slow, kernel]
        last = frames - 1
        inside = (slots >= 0) & (slots <= last) & (fast_owner[slots.clamp(0, last)] == slow_owner[:, None])
        return slots.where(inside, last + 1)

    def _convolved(self, fast: Tensor, windows: Tensor, *, as_batch: bool = False) -> Tensor:
        """Convolve each window of packed Fast features by itself.

        They are a batch for cuDNN, which is slow on one long clip; else the convolution steps from window to window.
        """
        frames = take(nn.functional.pad(fast, (0, 0, 0, 0, 0, 1)), windows.flatten())  # the last frame is of zeros
        conv = self.conv_fast_to_slow

        def run(x: Tensor) -> Tensor:
            return nn.functional.conv3d(x, conv.weight, conv.bias, (conv.kernel_size[0], *conv.stride[1:]))

        return self._activated(ops.by_rows(run, frames, len(windows)) if as_batch else run(frames))


def _padded(slow: Tensor, times: Tensor, fused: Tensor, slow_length: int, fused_length: int) -> Timed:
    """Join the features of one clip by the released rule: zeros on both sides of the shorter input, the odd one behind.

    Padded features have no time of their own, but 0.
    """
    length = torch.sym_max(slow_length, fused_length)
    (front, back), fused_sides = ((rest // 2, rest - rest // 2) for rest in (length - slow_length, length - fused_length))
    slow, fused = nn.functional.pad(slow, (0, 0, 0, 0, front, back)), nn.functional.pad(fused, (0, 0, 0, 0, *fused_sides))
    return torch.cat((slow, fused), 1), nn.functional.pad(times, (front, back))
