"""A video network with or without SGS."""

from __future__ import annotations

import copy
import logging
from functools import partial
from typing import TYPE_CHECKING, Any, Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from atfr.models.graph import probing
from atfr.models.graph.compile import compiling, require_compiler
from atfr.models.graph.fusing import fusing
from atfr.models.graph.packed_program import PackedTrunk, Time
from atfr.models.graph.probing import evaluating
from atfr.models.graph.recompute import recomputing
from atfr.models.graph.tracing import DenseNetwork, Traced, read_again
from atfr.models.locations import Stages, resolve
from atfr.models.packed.registry import NoPackedForm
from atfr.models.packed.segments import take
from atfr.models.sgs.config import SGSConfig
from atfr.models.sgs.layer import SGS, Proposal
from atfr.models.sgs.record import Sampling
from atfr.models.sgs.sampling import AtLeast, Decision, Forced, Sampled, decide, sample

if TYPE_CHECKING:
    from atfr.models.flops import GflopsTable

log = logging.getLogger(__name__)

BatchNorm = nn.modules.batchnorm._BatchNorm
MOST_SHAPES = 256  # of clips, whose T at the layers is remembered
TOLERANCE = 0.01  # of the self-check, in standard deviations of the logits: TF32 may give 0.001, a leak between clips gives 0.05 and more


class VideoNet(nn.Module):
    """A network for clips [N, 3, T, H, W], sampled by SGS after one or several of its stages.

    It has the modules, parameters and buffers of `network` under their own names, and the SGS layers under `sgs`.
    Everything runs in channels-last memory, in which a frame is one block. Clips of different B' run together packed; a
    network that cannot be packed runs bucketed, one batch for each B'.

    Args:
        network: maps clips to logits [N, classes]; its head must pool over whatever it is given.
        stages: names for `sgs.after`: the path of a module in the network, or a tuple of other names that are meant
            together. Any other module's path may be given, too, and `input`, for the clips themselves.
        sgs: None for the dense network.
        probe: (frames, height, width) of a small clip that the network can run on, to find its shapes and for the
            self-check.

    Attributes:
        sgs: the SGS layers by name, with _ for each dot.
        execution: "dense", "packed" or "bucketed".
        locations: {name of a layer: path of the module whose output it samples}.
        stage_paths: {name of a stage: path of the module that ends it}; empty if `stages` names none.
        times: what the lengths at each node of the packed trunk depend on.
        layer_inputs: the same for the input of each layer that lies behind another one.

    Raises:
        ValueError: `sgs.after` is not a location of this network, or has no features in time; sampled features meet
            features that are not; torch.fx cannot trace the network; it runs on no fewer features than all; packed
            execution is asked for and not possible; or a module of the network has a name that this class uses.
    """

    def __init__(self, network: nn.Module, *, stages: Stages = {}, sgs: SGSConfig | None = None, probe: tuple[int, int, int] = (16, 64, 64)) -> None:
        super().__init__()
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.dim() == 5:  # `network.to` fails for a 2D convolution
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last_3d)
        self._recipe = (stages, sgs, probe)
        self.execution = "dense"
        self.times: dict[str, Time] = {}
        self.layer_inputs: dict[str, Time] = {}
        self.locations: dict[str, str] = {}
        self.stage_paths = {name: path for name, path in stages.items() if isinstance(path, str)}
        self._levels: list[list[str]] = []  # keys of `sgs`
        self._num_classes = 0  # found where a layer needs it
        self._programs: tuple[nn.Module, ...] = (DenseNetwork(network),) if sgs is None else ()
        self._on_gpu: tuple[nn.Module, ...] = ()  # what runs there in place of `_programs`
        self._training_programs: tuple[nn.Module, ...] | None = None  # see `prepare`
        self._evaluation_programs: tuple[nn.Module, ...] | None = None
        self._least: dict[tuple, tuple[int, ...]] = {}  # see `_least_alone`
        self._tables: dict[tuple[int, ...], GflopsTable] = {}  # by clip shape
        self._frames: dict[tuple[int, ...], tuple[int, ...]] = {}  # T at each layer of the first level, by clip shape
        # The network's modules are registered here under their own names. The network itself is kept out of the module tree,
        # in which every parameter would have a second name, and so are the programs, which call its modules.
        self._network = (network,)
        self._parameters, self._buffers = network._parameters, network._buffers
        self._non_persistent_buffers_set = network._non_persistent_buffers_set
        for name, module in network._modules.items():
            if name == "sgs" or hasattr(self, name):
                raise ValueError(f"the network has a module {name!r}, a name that VideoNet uses itself: rename that module")
            self.add_module(name, module)
        self.sgs = nn.ModuleDict()
        if sgs is not None:
            self._add_sgs(sgs, stages, probe)

    def _add_sgs(self, sgs: SGSConfig, stages: Stages, probe: tuple[int, int, int]) -> None:
        self.locations = locations = resolve(sgs.locations, stages, self.dense_network)
        traced = Traced(self.dense_network, locations, before_activation=sgs.before_activation, embeds_clip=sgs.embeds_clip)
        of_clip = {traced.cuts[cut] for cut in traced.levels[0]} if sgs.embeds_clip else set()
        clip = torch.zeros(1, 3, *probe, device=self._like.device)
        features = probing.features_of(self, traced.stem(list(traced.cuts)), clip)
        channels: dict[str, tuple[int, int]] = {}  # of what each layer embeds, and of what it samples
        for name, x in zip(locations, features):
            if not isinstance(x, Tensor) or x.dim() != 5 or x.shape[2] < 2:
                shape = list(x.shape) if isinstance(x, Tensor) else f"a {type(x).__name__}"
                raise ValueError(f"sgs.after={name!r} gives {shape} for a clip of {probe}: SGS needs [N, C, T, H, W] with more than one feature in time")
            channels[name] = clip.shape[1] if name in of_clip else x.shape[1], x.shape[1]
        if sgs.embedding == "glance":
            with evaluating(self):
                self._num_classes = probing.num_classes(self.dense_network, clip)
        self._levels = [[_key(traced.cuts[cut]) for cut in cuts] for cuts in traced.levels]
        stem = traced.stem()
        if sgs.execution != "bucketed":
            try:
                self._run_packed(traced, stem, sgs, channels, probe)
                return
            except NoPackedForm as error:
                if sgs.execution == "packed":
                    raise
                log.warning("%s; this network runs bucketed: exact, slower, and not to be trained with batch norm that is not frozen", error)
        self._run_bucketed(traced, stem, sgs, channels, probe)

    def forward(
        self, clips: Tensor, forced: Forced | None = None, *, return_sampling: bool = False
    ) -> Tensor | tuple[Tensor, Sampling]:
        """Return the logits [N, classes] of clips [N, 3, T, H, W]; with `return_sampling`, also what the SGS layers did.

        Args:
            forced: replaces the layers' decisions, see `sgs.sampling.sample`.

        Raises:
            ValueError: clips of another shape or on another device than the network, or too short for the layers behind
                SGS; or an SGS layer is not calibrated.
            NonFiniteFeatures: what a layer embeds or, on the CPU, samples holds a NaN or an infinity.
        """
        probing.check_batch(clips, self._like.device)
        clips = clips.contiguous(memory_format=torch.channels_last_3d)
        sampled: tuple[Sampled, ...] = ()
        try:
            if self.sgs:
                if not return_sampling:
                    for layer in self.sgs.values():
                        layer.require_no_glance()
                if forced is None and self.training and len(clips) == 1:  # two clips always have enough for batch norm
                    forced = [AtLeast(bins) for bins in self._least_alone(clips)] or None
                logits, sampled = self._run_sampled(clips, forced)
            else:
                if self.training and len(clips) == 1:
                    self._least_alone(clips)
                logits = self._running[0](clips)
        except (RuntimeError, IndexError) as error:
            self._explain(error, clips)
            raise
        return (logits, Sampling(sampled, len(clips), tuple(clips.shape[1:]), self.gflops_table)) if return_sampling else logits

    @property
    def dense_network(self) -> nn.Module:
        """The network without SGS, which shares all modules with this one."""
        return self._network[0]

    @property
    def _like(self) -> Tensor:
        """A parameter, for its device and type."""
        return next(self.parameters())

    def train(self, mode: bool = True) -> VideoNet:
        """Set the training mode of all modules, and of the network that they come from."""
        super().train(mode)
        self.dense_network.train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VideoNet:
        """Move or convert the network, and what its programs read of it."""
        super()._apply(fn, recurse)
        read_again((*self._programs, *self._on_gpu, *(self._training_programs or ()), *(self._evaluation_programs or ())), self.dense_network)
        return self

    def gflops_table(self, clip_shape: tuple[int, ...]) -> GflopsTable:
        """Return the table of GFLOPs by B' of clips (3, T, H, W), made at the first call."""
        from atfr.models.flops import GflopsTable  # which needs a finished VideoNet

        if clip_shape not in self._tables:
            self._tables[clip_shape] = GflopsTable(self, clip_shape)
        return self._tables[clip_shape]

    def check_clip(self, frames: int, height: int, width: int) -> None:
        """Raise ValueError, with the least number of frames, unless the network can run on such clips."""
        probing.check_clip(self.dense_network, frames, height, width)

    def check_training(self, frames: int, height: int, width: int) -> None:
        """Raise ValueError unless a batch of one such clip has more than one value a channel for each batch norm in training mode."""
        self._least_alone(torch.zeros(1, 3, frames, height, width, device=self._like.device, dtype=self._like.dtype))

    def _least_alone(self, clip: Tensor) -> tuple[int, ...]:
        """Return `probing.least_for_batch_norm` of this clip's shape; () if no batch norm takes its statistics from this batch alone."""
        # `sync_batchnorm` replaces the forward of norms that take them from all ranks.
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

    def run_stem(self, clips: Tensor) -> tuple[Tensor, ...]:
        """Run the layers in front of SGS: return the features to sample, then tensors that bypass sampling."""
        return self._running[0](clips)

    def run_trunk(self, *features: Tensor, forced: Forced | None = None, decision: Decision | None = None) -> tuple[Tensor, tuple[Sampled, ...]]:
        """Sample what `run_stem` returned and run the layers behind: logits [N, classes], and what was done."""
        trunk = self._running[1]
        run = trunk if self.execution == "packed" else partial(self._bucketed, trunk)
        return run(*features, forced, decision)

    def _run_sampled(self, clips: Tensor, forced: Forced | None) -> tuple[Tensor, tuple[Sampled, ...]]:
        """Run stem and trunk. Layers that embed the clips decide first, so that a GPU works on the stem while B' is fetched.

        They decide behind the stem in the first batch of clips of a shape: T at their locations is not known before it.
        """
        layers, shape = self.levels[0], tuple(map(int, clips.shape[1:]))
        decision = None
        if shape in self._frames:
            asked = None if forced is None else [ask for layer, ask in zip(self.sgs.values(), forced) if layer in layers]
            decision = decide(layers, self._frames[shape], [None] * len(layers), asked, clips)
        features = self.run_stem(clips)
        if layers[0].options.embeds_clip:  # all layers have the same options
            if shape not in self._frames and len(self._frames) >= MOST_SHAPES:
                self._frames.clear()
            self._frames[shape] = tuple(int(x.shape[2]) for x in features[: len(layers)])
        return self.run_trunk(*features, forced=forced, decision=decision)

    def propose(self, clips: Tensor) -> list[Proposal]:
        """Return what each layer of the first level proposes for clips [N, 3, T, H, W]; the layers behind are not run."""
        probing.check_batch(clips, self._like.device)
        layers = self.levels[0]
        features = self.run_stem(clips.contiguous(memory_format=torch.channels_last_3d))
        clip = features[len(layers)] if len(features) > len(layers) else None  # the stem returns it where it is embedded
        return [layer(x, None, clip) for layer, x in zip(layers, features)]

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
        programs = self._programs if self.sgs else (Traced(self.dense_network, {}).whole(),)
        if compute_again:
            self._training_programs = tuple(recomputing(program, ends=program is programs[-1]) for program in programs)
            return
        require_compiler()
        self._training_programs = self._evaluation_programs = tuple(compiling(program, backend=backend) for program in programs)

    def __deepcopy__(self, memo: dict[int, Any]) -> VideoNet:
        copied = memo[id(self)] = self.__class__.__new__(self.__class__)
        fresh: dict[str, Any] = {"_training_programs": None, "_evaluation_programs": None, "_tables": {}}
        copied.__dict__.update(copy.deepcopy({**self.__dict__, **fresh}, memo))
        return copied

    def __reduce__(self) -> tuple[Callable, tuple]:
        """Pickle the network and the SGS layers; the programs, which torch.fx cannot pickle, are traced anew."""
        return _rebuilt, (type(self), self.dense_network, self._recipe, self.sgs, self.training)

    @property
    def _running(self) -> tuple[nn.Module, ...]:
        programs = (self._like.device.type == "cuda" and self._on_gpu) or self._programs
        if not self.training:
            return self._evaluation_programs or programs
        # Statistics are taken in training mode and without gradients, with other batch norms.
        return (torch.is_grad_enabled() and self._training_programs) or programs

    @property
    def levels(self) -> list[list[SGS]]:
        """The SGS layers in the order in which they run, those that run together in one list."""
        return [[self.sgs[key] for key in keys] for keys in self._levels]

    @property
    def packed_trunk(self) -> nn.Module:
        """The program of packed execution: (the stem's outputs, forced, decision) -> (logits, what was done)."""
        return self._programs[1]

    def _run_packed(self, traced: Traced, stem: nn.Module, sgs: SGSConfig, channels: Mapping[str, tuple[int, int]], probe: tuple[int, int, int]) -> None:
        """Add the layers and run packed; NoPackedForm if that is not possible or fails the self-check."""
        packed = PackedTrunk(traced, lambda name: f"sgs.{_key(name)}")
        norms = [m for m in self.modules() if isinstance(m, BatchNorm)]
        self._add_layers(sgs, channels, packed.least_bins(), gap=packed.gap, norms=norms)
        trunk = packed.module({f"sgs.{key}": layer for key, layer in self.sgs.items()})
        self._self_check(traced, stem, packed, trunk, probe)
        self.execution, self._programs, self._on_gpu = "packed", (stem, trunk), (stem, fusing(trunk))
        self.times, self.layer_inputs = packed.times, packed.inputs

    def _run_bucketed(self, traced: Traced, stem: nn.Module, sgs: SGSConfig, channels: Mapping[str, tuple[int, int]], probe: tuple[int, int, int]) -> None:
        """Add the layer and run the rest of the network once for each B'."""
        if len(channels) > 1:
            raise ValueError(f"a network that cannot run packed takes one SGS layer, not {len(channels)}")
        (name,), trunk = channels, traced.plain_trunk()
        with evaluating(self):
            x, *bypassing = stem(torch.zeros(2, 3, *probe, device=self._like.device))
            least = probing.least_features(trunk, x, bypassing, name=name)
        self._add_layers(sgs, channels, {name: least})
        self.execution, self._programs = "bucketed", (stem, trunk)

    def _add_layers(self, sgs: SGSConfig, channels: Mapping[str, tuple[int, int]], least: Mapping[str, int], **options: Any) -> None:
        depths = {key: depth for depth, keys in enumerate(self._levels) for key in keys}
        layers = nn.ModuleDict()
        for name, (embedded, sampled) in channels.items():
            layers[_key(name)] = SGS(embedded, sgs, name=name, num_classes=self._num_classes, sampled_channels=sampled, min_bins=least[name], depth=depths[_key(name)], **options)
        self.sgs = layers.to(self._like.device)

    def _bucketed(self, trunk: nn.Module, x: Tensor, *rest: Any) -> tuple[Tensor, tuple[Sampled, ...]]:
        """Clips that keep equally many features run together."""
        *passing, forced, decision = rest
        norm = next((name for name, m in self._programs[1].named_modules() if isinstance(m, BatchNorm) and m.training), None)
        if norm is not None:
            raise ValueError(f"bucketed execution would give batch norm {norm!r} the statistics of one bucket after the other: freeze it, or make the network packable (docs/packed-execution.md)")
        packed, sampled = sample(list(self.sgs.values()), [x], [None], forced, (*passing, x)[0], decision)  # the clip is the first to pass
        lengths = torch.tensor(sampled[0].segments.lengths)
        starts = lengths.cumsum(0) - lengths
        logits: dict[int, Tensor] = {}
        for length in lengths.unique().tolist():
            clips = (lengths == length).nonzero()[:, 0]
            places = (starts[clips, None] + torch.arange(length)).flatten().to(x.device)
            frames = take(packed[0], places)[0].unflatten(1, (len(clips), length)).transpose(0, 1)  # [n, C, B', H, W]
            out = trunk(frames.contiguous(memory_format=torch.channels_last_3d), *(p[clips.to(p.device)] for p in passing))
            logits.update(zip(clips.tolist(), out))
        return torch.stack([logits[clip] for clip in range(len(lengths))]), sampled

    def _self_check(self, traced: Traced, stem: nn.Module, packed: PackedTrunk, trunk: nn.Module, probe: tuple[int, int, int]) -> None:
        """Raise NoPackedForm unless clips of different length give together what they give alone."""
        device = self._like.device
        if device.type == "meta":
            return
        random = torch.Generator().manual_seed(0)
        clips = torch.randn(3, 3, *probe, generator=random).to(device)
        # A norm at its start may multiply a branch by zero, and nothing of it would be seen.
        norms = {name: torch.rand(p.shape, generator=random).to(p) + 0.5 for name, p in trunk.named_parameters() if p.dim() == 1}
        with evaluating(self):
            features = stem(clips.contiguous(memory_format=torch.channels_last_3d))
            forced = self._uneven(traced, packed, features)
            try:
                with probing.silent():
                    together = torch.func.functional_call(trunk, norms, (*features, forced))[0]
            except Exception as failure:  # of any type, from any operation
                raise NoPackedForm(f"what follows does not run on clips that keep different numbers of features: {probing.first_line(failure)}") from failure
            for i, row in enumerate(together):
                one = [[lengths[i : i + 1] for lengths in forced]]
                alone = torch.func.functional_call(trunk, norms, (*(f[i : i + 1] for f in features), *one))[0][0]
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
                given = frames.get(name) or (time.lengths(forced[time.source]) if time is not None and time.source in forced else (least,) * 3)
                if min(given) < least:
                    raise ValueError(f"sgs.after={name!r}: what follows needs at least {least} features, and there are {min(given)}")
                forced[name] = (given[0], least, (least + given[2] + 1) // 2)
        return [forced[name] for name in traced.cuts.values()]


def _rebuilt(kind: type[VideoNet], network: nn.Module, recipe: tuple, layers: nn.ModuleDict, training: bool) -> VideoNet:
    """A pickled VideoNet."""
    stages, sgs, probe = recipe
    with torch.random.fork_rng(devices=[]):
        model = kind(network, stages=stages, sgs=sgs, probe=probe)
    model.sgs.load_state_dict(layers.state_dict())
    for own, given in zip(model.sgs.parameters(), layers.parameters()):
        own.requires_grad_(given.requires_grad)
    model.sgs.train(training)
    model.training = training
    return model


def _key(name: str) -> str:
    return name.replace(".", "_")
