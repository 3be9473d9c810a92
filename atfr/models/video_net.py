"""A video network with or without SGS, behind one interface."""

from __future__ import annotations

import difflib
import logging
from contextlib import contextmanager
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Sequence

import torch
from torch import Tensor, nn

from atfr.models.graph import probing
from atfr.models.graph.compile import compiling, require_compiler
from atfr.models.graph.packed_program import PackedTrunk, Time
from atfr.models.graph.probing import evaluating
from atfr.models.graph.recompute import recomputing
from atfr.models.graph.tracing import INPUT, DenseNetwork, Traced
from atfr.models.packed.registry import NoPackedForm
from atfr.models.packed.segments import take
from atfr.models.sgs.config import SGSConfig
from atfr.models.sgs.layer import SGS, Sampled, sample

log = logging.getLogger(__name__)

Stages = Mapping[str, "str | tuple[str, ...]"]
BatchNorm = nn.modules.batchnorm._BatchNorm
PREFIX = "backbone."
TOLERANCE = 1e-3  # of the self-check, in standard deviations of the logits; a leak between clips is 0.05 and more


class Prediction(NamedTuple):
    """logits [N, classes], and what each SGS layer did, in the order of `model.sgs.after`."""

    logits: Tensor
    sampled: tuple[Sampled, ...]  # empty for a dense network
    clip_frames: int  # T of the clips

    @property
    def bins(self) -> list[tuple[int, ...]]:
        """B' of each clip, one number a layer; T where nothing is sampled."""
        if not self.sampled:
            return [(self.clip_frames,)] * len(self.logits)
        return list(zip(*(s.segments.lengths for s in self.sampled)))

    @property
    def frames(self) -> tuple[int, ...]:
        """For each layer, how many features a clip has there where none is dropped."""
        return tuple(s.segments.frames for s in self.sampled) or (self.clip_frames,)


class VideoNet(nn.Module):
    """`backbone` on clips [N, 3, T, H, W], sampled by SGS after one or several of its stages.

    Everything runs in channels-last memory, in which a frame is one block. Clips of different B'
    run together packed; a network that cannot be packed runs bucketed, one batch for each B'.

    Args:
        backbone: maps clips to logits [N, classes]; its head must pool over whatever it is given.
        stages: names for `sgs.after`: the path of a module in the backbone, or a tuple of other
            names that are meant together. Any other module's path may be given, too, and `input`,
            for the clips themselves.
        sgs: None for the dense network, which then is the backbone and nothing else.
        probe: (frames, height, width) of a small clip that the backbone can run on, for a look at
            its shapes and for the self-check.

    Attributes:
        execution: "dense", "packed" or "bucketed".
        times: what the lengths at each node of the packed trunk depend on.
        layer_inputs: the same for what is given to each layer that lies behind another one.
        places: {name of a layer: path of the backbone's module whose output it samples}.
        stages: {name of a stage: path of the backbone's module that ends it}; empty for a custom network.

    Raises:
        ValueError: `sgs.after` is not a place of this network, or has no features in time; what is
            sampled meets what is not; torch.fx cannot trace the backbone; it runs on no fewer features
            than all; or packed execution was asked for and is not possible.
    """

    def __init__(self, backbone: nn.Module, *, stages: Stages, sgs: SGSConfig | None, probe: tuple[int, int, int] = (16, 64, 64)) -> None:
        super().__init__()
        self.backbone = backbone.to(memory_format=torch.channels_last_3d)
        self.sgs = nn.ModuleDict()  # a layer each place, under its name with _ for .
        self.execution = "dense"
        self.times: dict[str, Time] = {}
        self.layer_inputs: dict[str, Time] = {}
        self.places: dict[str, str] = {}
        self.stages = {name: path for name, path in stages.items() if isinstance(path, str)}
        # Kept out of the module tree: the programs call the backbone's own modules, and registering
        # them would list every parameter a second time.
        self._programs: tuple[nn.Module, ...] = ()
        self._training_programs: tuple[nn.Module, ...] | None = None  # see `prepare`
        self._evaluation_programs: tuple[nn.Module, ...] | None = None
        self._least: dict[tuple, tuple[int, ...]] = {}  # see `_least_alone`
        if sgs is None:
            self._programs = (DenseNetwork(self.backbone),)
            return
        self.places = places = _resolve(sgs.places, stages, backbone)
        traced = Traced(backbone, places, root=self, before_activation=sgs.before_activation, embeds_clip=sgs.embeds_clip)
        looking = {traced.cuts[cut] for cut in traced.levels[0]} if sgs.embeds_clip else set()
        clip = torch.zeros(1, 3, *probe, device=next(backbone.parameters()).device)
        with evaluating(self):  # so that the probe leaves the running statistics alone
            features = traced.stem(list(traced.cuts))(clip)
        for name, x in zip(places, features):
            if not isinstance(x, Tensor) or x.dim() != 5 or x.shape[2] < 2:
                shape = list(x.shape) if isinstance(x, Tensor) else f"a {type(x).__name__}"
                raise ValueError(f"model.sgs.after={name!r} gives {shape} for a clip of {probe}: SGS needs [N, C, T, H, W] with more than one feature in time")
            self.sgs[_key(name)] = SGS(clip.shape[1] if name in looking else x.shape[1], sgs, name=name)
        self._levels = [[_key(traced.cuts[cut]) for cut in cuts] for cuts in traced.levels]
        stem = traced.stem()
        self._programs = (stem, self._trunk(traced, stem, sgs.execution, probe))

    def forward(self, clips: Tensor, forced: Sequence[tuple[int, ...]] | None = None) -> Prediction:
        """Logits of clips [N, 3, T, H, W]; for `forced` see `sgs_layer.sample`.

        Raises:
            ValueError: clips of another shape or on another device than the network, or too short
                for what follows a layer.
        """
        device = next(self.parameters()).device
        if clips.dim() != 5 or clips.device != device:
            raise ValueError(f"clips must be [N, 3, T, H, W] on {device}, like the network, not {list(clips.shape)} on {clips.device}")
        if clips.shape[0] < 1 or clips.shape[1] != 3 or not clips.is_floating_point():
            raise ValueError(f"clips must be floating point [N, 3, T, H, W] with at least one clip, not {clips.dtype} {list(clips.shape)}")
        clips = clips.contiguous(memory_format=torch.channels_last_3d)
        try:
            with self._enough_for_batch_norm(clips):
                if not self.sgs:
                    return Prediction(self._running[0](clips), (), clips.shape[2])
                logits, sampled = self.trunk(*self.stem(clips), forced=forced)
        except (RuntimeError, IndexError) as error:
            self._explain(error, clips)
            raise
        return Prediction(logits, sampled, clips.shape[2])

    def check_clip(self, frames: int, height: int, width: int) -> None:
        """Raise ValueError, with the least number of frames, unless the network can run on such clips."""
        probing.check_clip(self.backbone, frames, height, width)

    def check_training(self, frames: int, height: int, width: int) -> None:
        """Raise ValueError unless a batch of one such clip has more than one value a channel for each batch norm in training mode."""
        like = next(self.parameters())
        self._least_alone(torch.zeros(1, 3, frames, height, width, device=like.device, dtype=like.dtype))

    @contextmanager
    def _enough_for_batch_norm(self, clips: Tensor) -> Iterator[None]:
        """Make the layers keep at least as many features as batch norm needs in training. Two clips always have enough."""
        before = {layer: layer.min_bins for layer in self.sgs.values()}
        if self.training and len(clips) == 1:
            for layer, least in zip(before, self._least_alone(clips)):
                layer.min_bins = least
        try:
            yield
        finally:
            for layer, least in before.items():
                layer.min_bins = least

    def _least_alone(self, clip: Tensor) -> tuple[int, ...]:
        """Return `trials.least_for_batch_norm` of this clip's shape; () if no batch norm takes its statistics from this batch alone."""
        # `engine.sync_norm` replaces the forward of norms that take them from all processes.
        norms = {m: name for name, m in self.named_modules() if isinstance(m, BatchNorm) and m.training and "forward" not in vars(m)}
        if not norms or self.execution == "bucketed":  # which refuses such norms
            return ()
        key = clip.shape, tuple(norms)
        if key not in self._least:
            zeros = torch.zeros_like(clip, memory_format=torch.channels_last_3d)
            with evaluating(self), probing.without_hooks(self):
                self._least[key] = probing.least_for_batch_norm(self._programs, list(self.sgs.values()), norms, zeros)
        return self._least[key]

    def _explain(self, error: Exception, clips: Tensor) -> None:
        """Raise ValueError where an error comes from the clips' size or from a network on several devices."""
        probing.check_devices(self)
        if not isinstance(error, torch.OutOfMemoryError):
            self.check_clip(*clips.shape[2:])

    def stem(self, clips: Tensor) -> tuple[Tensor, ...]:
        """What runs before any sampling: the features to sample, then whatever passes them by."""
        return self._running[0](clips)

    def trunk(self, *features: Tensor, forced: Sequence[tuple[int, ...]] | None = None) -> tuple[Tensor, tuple[Sampled, ...]]:
        """Sampling and what follows it, on what the stem gave: (logits [N, classes], what was done)."""
        trunk = self._running[1]
        return trunk(*features, forced) if self.execution == "packed" else self._bucketed(trunk, *features, forced=forced)

    def prepare(self, *, compute_again: bool = False, compiled: bool = False, backend: str | Callable = "inductor") -> None:
        """How the network runs from now on; copies of it run as they did at first.

        Args:
            compute_again: training keeps few activations for the backward pass, which computes the others again.
            compiled: training and evaluation run compiled by this backend of torch.compile.

        Raises:
            ValueError: torch.fx cannot trace the backbone, there is nothing to compile with, or both are asked for.
        """
        self._training_programs = self._evaluation_programs = None
        if compute_again and compiled:
            raise ValueError("compute_again and compiled do not go together: the compiler chooses itself what is computed again")
        if not (compute_again or compiled):
            return
        programs = self._programs if self.sgs else (Traced(self.backbone, {}).whole(),)
        if compute_again:
            self._training_programs = tuple(recomputing(program, ends=program is programs[-1]) for program in programs)
            return
        require_compiler()
        self._training_programs = self._evaluation_programs = tuple(compiling(program, backend=backend) for program in programs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_training_programs": None, "_evaluation_programs": None}

    @property
    def _running(self) -> tuple[nn.Module, ...]:
        if not self.training:
            return self._evaluation_programs or self._programs
        # Statistics are taken in training mode and without gradients, with other batch norms.
        return (torch.is_grad_enabled() and self._training_programs) or self._programs

    @property
    def levels(self) -> list[list[SGS]]:
        """The SGS layers in the order in which they run, those that run together in one list."""
        return [[self.sgs[key] for key in keys] for keys in self._levels] if self.sgs else []

    @property
    def packed_trunk(self) -> nn.Module:
        """The program of packed execution: (the stem's outputs, forced) -> (logits, what was done)."""
        return self._programs[1]

    def _trunk(self, traced: Traced, stem: nn.Module, execution: str, probe: tuple[int, int, int]) -> nn.Module:
        """The packed trunk, or the plain one where it cannot be packed; sets `execution`."""
        if execution != "bucketed":
            try:
                packed = PackedTrunk(traced, lambda name: f"sgs.{_key(name)}")
                for name, least in packed.least_bins().items():
                    self.sgs[_key(name)].min_bins = least
                    self.sgs[_key(name)].gap = packed.gap
                    self.sgs[_key(name)].norms = tuple(m for m in self.backbone.modules() if isinstance(m, BatchNorm))
                self._self_check(traced, stem, packed, probe)
                self.execution = "packed"
                self.times, self.layer_inputs = packed.times, packed.inputs
                return packed.module
            except NoPackedForm as error:
                if execution == "packed":
                    raise
                log.warning("%s; this network runs bucketed: exact, slower, and not to be trained with batch norm that is not frozen", error)
        if len(self.sgs) > 1:
            raise ValueError(f"a network that cannot run packed takes one SGS layer, not {len(self.sgs)}")
        self.execution, trunk = "bucketed", traced.plain_trunk()
        (layer,) = self.sgs.values()
        with evaluating(self):
            x, *passing = stem(torch.zeros(2, 3, *probe, device=next(self.backbone.parameters()).device))
            layer.min_bins = probing.least_features(trunk, x, passing, name=layer.name)
        return trunk

    def _bucketed(self, trunk: nn.Module, x: Tensor, *passing: Tensor, forced: Sequence[tuple[int, ...]] | None) -> tuple[Tensor, tuple[Sampled, ...]]:
        """Clips that keep equally many features run together."""
        if any(m.training for m in self.backbone.modules() if isinstance(m, BatchNorm)):
            raise ValueError("bucketed execution would give batch norm the statistics of one bucket after the other: freeze it, or make the network packable")
        packed, sampled = sample(list(self.sgs.values()), [x], [None], forced, (*passing, x)[0])  # the clip is the first to pass
        lengths = torch.tensor(sampled[0].segments.lengths)
        starts, logits = lengths.cumsum(0) - lengths, {}
        for length in lengths.unique().tolist():
            clips = (lengths == length).nonzero()[:, 0]
            places = (starts[clips, None] + torch.arange(length)).flatten().to(x.device)
            frames = take(packed[0], places)[0].unflatten(1, (len(clips), length)).transpose(0, 1)  # [n, C, B', H, W]
            out = trunk(frames.contiguous(memory_format=torch.channels_last_3d), *(p[clips.to(p.device)] for p in passing))
            logits.update(zip(clips.tolist(), out))
        return torch.stack([logits[clip] for clip in range(len(lengths))]), sampled

    def _self_check(self, traced: Traced, stem: nn.Module, packed: PackedTrunk, probe: tuple[int, int, int]) -> None:
        """Raise NoPackedForm unless clips of different length give together what they give alone."""
        device = next(self.backbone.parameters()).device
        if device.type == "meta":
            return
        random = torch.Generator().manual_seed(0)
        clips = torch.randn(3, 3, *probe, generator=random).to(device)
        # A norm at its start may multiply a branch by zero, and nothing of it would be seen.
        norms = {name: torch.rand(p.shape, generator=random).to(p) + 0.5 for name, p in packed.module.named_parameters() if p.dim() == 1}
        with evaluating(self):
            features = stem(clips.contiguous(memory_format=torch.channels_last_3d))
            forced = self._uneven(traced, packed, features)
            together = torch.func.functional_call(packed.module, norms, (*features, forced))[0]
            for i, row in enumerate(together):
                one = [[lengths[i : i + 1] for lengths in forced]]
                alone = torch.func.functional_call(packed.module, norms, (*(f[i : i + 1] for f in features), *one))[0][0]
                error = ((row - alone).abs().max() / together.std().clamp(min=1e-6)).item()
                if not error < TOLERANCE:
                    raise NoPackedForm(f"the network's logits change by {error:.2g} standard deviations when clips run packed")

    def _uneven(self, traced: Traced, packed: PackedTrunk, features: Sequence[Tensor]) -> list[tuple[int, ...]]:
        """B' of three clips at each layer: all, the least possible, and something between."""
        forced: dict[str, tuple[int, ...]] = {}
        frames = {traced.cuts[cut]: (x.shape[2],) * 3 for cut, x in zip(traced.levels[0], features)}
        for cuts in traced.levels:
            for name in (traced.cuts[cut] for cut in cuts):
                least, time = self.sgs[_key(name)].min_bins, packed.inputs.get(name)
                given = frames.get(name) or (time.lengths(forced[time.source]) if time.source in forced else (least,) * 3)
                if min(given) < least:
                    raise ValueError(f"model.sgs.after={name!r}: what follows needs at least {least} features, and there are {min(given)}")
                forced[name] = (given[0], least, (least + given[2] + 1) // 2)
        return [forced[name] for name in traced.cuts.values()]


def _resolve(names: Sequence[str], stages: Stages, backbone: nn.Module) -> dict[str, str]:
    """{layer name: module path} of the places that `sgs.after` names."""
    places: dict[str, str] = {}
    for name in names:
        target = stages.get(name, name)
        if isinstance(target, tuple):
            found = _resolve(target, stages, backbone)
        else:
            try:
                backbone.get_submodule(target)
            except AttributeError:
                if target != INPUT:
                    raise ValueError(f"model.sgs.after={name!r} is not a stage of this network; {_possible(target, stages, backbone)}") from None
            found = {name: target}
        for twice in found.keys() & places.keys():
            raise ValueError(f"model.sgs.after names the same place twice: {twice}")
        places.update(found)
    return places


def _possible(path: str, stages: Stages, backbone: nn.Module) -> str:
    """What there is in place of a path that does not exist: stages or top modules, and the paths most like it."""
    near = difflib.get_close_matches(path, [name for name, _ in backbone.named_modules() if name], n=5)
    like = f", such as {', '.join(near)}" if near else ""
    if stages:
        return f"choose one or a list of {', '.join((INPUT, *stages))}, or the path of a module{like}"
    return f"choose {INPUT}, the path of a module or a list of them; there are {', '.join(dict(backbone.named_children()))} and what is in them{like}"


def _key(name: str) -> str:
    return name.replace(".", "_")
