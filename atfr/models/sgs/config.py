"""The options of an SGS layer, and the presets that name a set of them."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, fields, replace
from typing import Any, Sequence

from atfr.models.sgs import functional
from atfr.models.sgs.functional import BASELINES, SEGMENTING

EMBEDDINGS = ("pooled", "glance", "mlp", "frozen")
EMBED_SOURCES = ("features", "clip")
EXECUTIONS = ("auto", "packed", "bucketed")
DEFAULT_GFLOPS = 0.5

# The value of an option that a layer does not use, so that two configs that sample alike are equal.
UNUSED = {
    "num_bins": None,
    "gflops": None,
    "keep_ratio": None,
    "gflops_range": None,
    "width": None,
    "metric": "l2",
    "kernel": "mean",
    "scale": "relative",
    "edges": "released",
    "order": "time",
    "embedding": "pooled",
    "embedding_dim": 8,
    "grid": 4,
    "embed_from": "features",
    "noise_floor": False,
    "cost_exponent": 0.0,
    "same_number": False,
}


@dataclass(frozen=True, kw_only=True)
class SGSConfig:
    """Where SGS sits in a network and how it samples. The defaults are the preset `atfr`.

    An option that the chosen similarity does not use is reset to its entry in `UNUSED`.

    Raises:
        ValueError: an option has an impossible value, or two options contradict each other.
    """

    after: str | Sequence[str] = "stem"  # stage or module path whose output is sampled, or several; `input`: the clip
    before_activation: bool = False  # sample before that stage's last ReLU
    gflops: float | None = DEFAULT_GFLOPS  # budget: mean GFLOPs of a clip as a share of the dense network's
    keep_ratio: float | None = None  # budget given as mean B' / T instead of `gflops`
    gflops_range: Sequence[float] | None = None  # draw each training batch's budget from this range: one network for all of them
    num_bins: int | None = None  # B, the most features a clip keeps; None: T. A baseline, or same_number, keeps exactly so many
    same_number: bool = False  # partition: all clips keep equally many features, and the content decides only which
    width: float | None = None  # absolute scale: a fixed bin width instead of a budget
    similarity: str = "partition"  # see atfr.models.sgs.functional
    metric: str = "l2"  # l2 | l1 | cosine | mahalanobis
    kernel: str = "mean"  # linear | linear_normalized | delta | delta_normalized | mean | middle (frame of the bin)
    scale: str = "absolute"  # absolute: one bin width for all clips | relative: to each clip's largest distance
    edges: str = "released"  # released (2B) | inclusive (2B - 1)
    order: str = "time"  # of the kept features: similarity | time
    embedding: str = "pooled"  # pooled (no parameters) | glance (learned, see glance.py) | mlp (learned, as published) | frozen (the same, not learned)
    embedding_dim: int = 8  # D of glance, mlp and frozen
    grid: int = 4  # cells per side to which pooled and glance average a frame
    embed_from: str = "clip"  # clip: embed raw frames | features: embed the sampled features
    noise_floor: bool = False  # path: subtract the median step of the training clips from every step
    cost_exponent: float = 0.5  # partition: cost of a bin = width^2 x E_1^exponent; at 1, B' ignores the amount of change
    time_embedding: bool = False  # tell the layers behind when each kept feature was (learned, zero at the start)
    execution: str = "auto"  # of the layers behind SGS: auto | packed | bucketed

    def __post_init__(self) -> None:
        scale = "relative" if self.similarity in BASELINES else self.scale
        functional.check_choices(self.similarity, self.metric, self.kernel, scale, self.edges, self.order)
        _check(self)
        for name in self.unused_options():
            object.__setattr__(self, name, UNUSED[name])
        if self.follows_budget and self.gflops is None and self.keep_ratio is None:
            object.__setattr__(self, "gflops", DEFAULT_GFLOPS)

    @classmethod
    def from_preset(cls, preset: str, **options: Any) -> SGSConfig:
        """Return the preset of this name with some of its options changed.

        Raises:
            ValueError: there is no such preset or option, or the result does not use a given option.
        """
        if preset not in PRESETS:
            near = difflib.get_close_matches(preset, PRESETS)
            meant = f"; did you mean {' or '.join(near)}?" if near else ";"
            raise ValueError(f"sgs preset {preset!r} does not exist{meant} choose one of {', '.join(PRESETS)}, or off for the dense network")
        names = [field.name for field in fields(cls)]
        for name in options:
            if name not in names:
                raise ValueError(f"sgs has no option {name!r}; choose from {', '.join(names)}")
        config = replace(PRESETS[preset], **{**_budget_of(options), **options})
        for name, value in options.items():
            if name in config.unused_options() and value != UNUSED[name]:
                used = ["similarity"] if config.is_baseline else ["similarity", "scale"]
                if config.has_fixed_cost:
                    used += [option for option in ("num_bins", "same_number") if getattr(config, option)]
                raise ValueError(f"sgs {name}={value!r} has no effect with {', '.join(f'{option}={getattr(config, option)}' for option in used)}; remove it")
        return config

    def unused_options(self) -> set[str]:
        """Return the names of the options that have no effect next to the others."""
        budget = {"gflops", "keep_ratio"}
        beside_number = _second_budget(self) if self.num_bins is None else budget  # where B' is the same for all clips
        if self.is_baseline:
            keeps_all = {*budget, "num_bins"} if self.similarity == "none" else set()
            return {*UNUSED} - {*budget, "num_bins"} | keeps_all | beside_number
        unused = {"metric", "order", *(["kernel"] if self.kernel == "mean" else [])} if self.similarity in SEGMENTING else {"metric"} if self.similarity == "magnitude" else set()
        unused |= {"edges"} if self.scale == "absolute" else {*budget, "gflops_range", "width"}
        if self.has_fixed_cost:
            unused |= {"gflops_range", "width", "cost_exponent"} | beside_number
        else:
            unused |= {*budget, "gflops_range"} if self.width is not None else _second_budget(self)
        unused |= {"pooled": {"embedding_dim"}, "glance": set()}.get(self.embedding, {"grid"})
        unused |= set() if self.similarity == "path" else {"noise_floor"}
        return unused | (set() if self.similarity == "partition" else {"cost_exponent", "same_number"})

    def used_options(self) -> dict[str, Any]:
        """Return the options that have an effect, by name."""
        unused = self.unused_options()
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in unused}

    @property
    def is_baseline(self) -> bool:
        """Whether what is kept does not depend on what a clip shows."""
        return self.similarity in BASELINES

    @property
    def has_fixed_cost(self) -> bool:
        """Whether B' does not depend on what a clip shows."""
        return self.is_baseline or (self.similarity == "partition" and self.same_number)

    @property
    def follows_budget(self) -> bool:
        """Whether `gflops` or `keep_ratio` decides how many features a clip keeps on average."""
        return not {"gflops", "keep_ratio"} <= self.unused_options()

    @property
    def embeds_clip(self) -> bool:
        """Whether the similarity embedding is that of the clip itself."""
        return self.embed_from == "clip" and not self.is_baseline

    @property
    def locations(self) -> tuple[str, ...]:
        """`after` as a tuple of names."""
        return (self.after,) if isinstance(self.after, str) else tuple(self.after)


def _second_budget(config: SGSConfig) -> set[str]:
    return set() if config.keep_ratio is None else {"gflops"}


def _budget_of(options: dict[str, Any]) -> dict[str, Any]:
    """The budget options to reset where the options give another kind of budget.

    Raises:
        ValueError: they give two kinds.
    """
    given = [name for name in ("gflops", "keep_ratio", "width") if options.get(name) is not None]
    if len(given) > 1:
        raise ValueError(f"sgs {given[0]} and {given[1]} are both given: set one of them")
    return {"gflops": {"gflops": options.get("gflops"), "keep_ratio": None, "width": None}, "keep_ratio": {"width": None}}.get("".join(given), {})


def _check(config: SGSConfig) -> None:
    for name, possible in (("embedding", EMBEDDINGS), ("embed_from", EMBED_SOURCES), ("execution", EXECUTIONS)):
        if getattr(config, name) not in possible:
            raise ValueError(f"sgs {name}={getattr(config, name)!r} does not exist; choose one of {', '.join(possible)}")
    if not isinstance(config.after, (str, Sequence)) or not all(isinstance(name, str) for name in config.after):
        raise ValueError(f"sgs after={config.after!r} must be the name of a stage, the path of a module, or a list of these")
    if not config.locations:
        raise ValueError("sgs after is empty: name a stage, or use the network without SGS")
    if config.kernel in ("mean", "middle") and config.embedding == "mlp" and not config.is_baseline:
        raise ValueError(f"sgs kernel={config.kernel} passes no gradient to embedding=mlp, which would stay random: set embedding=glance, pooled or frozen")
    for name in ("before_activation", "same_number", "noise_floor", "time_embedding"):
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"sgs {name} must be True or False, not {getattr(config, name)!r}")
    if config.num_bins is not None and (not isinstance(config.num_bins, int) or config.num_bins < 1):
        raise ValueError(f"sgs num_bins must be a whole number of at least 1, not {config.num_bins!r}")
    if config.embedding_dim < 1 or config.grid < 1:
        raise ValueError(f"sgs embedding_dim ({config.embedding_dim}) and grid ({config.grid}) must be at least 1")
    for name, whole in (("gflops", "the dense network's GFLOPs"), ("keep_ratio", "the frames")):
        value = getattr(config, name)
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"sgs {name} is a share of {whole}, above 0 and at most 1, not {value}")
    if config.width is not None and not 0 < config.width < math.inf:
        raise ValueError(f"sgs width must be above 0, not {config.width}")
    if config.width is not None and config.scale != "absolute":
        raise ValueError("sgs width is one bin width for all clips, which scale=relative does not have: set scale=absolute")
    if not 0 <= config.cost_exponent <= 1:
        raise ValueError(f"sgs cost_exponent={config.cost_exponent} must be from 0 to 1")
    if config.gflops_range is not None:
        if len(config.gflops_range) != 2 or not 0 < config.gflops_range[0] <= config.gflops_range[1] <= 1:
            raise ValueError(f"sgs gflops_range={list(config.gflops_range)} must be the smallest and the largest share of the dense GFLOPs, above 0 and at most 1")
        if config.scale != "absolute" or config.width is not None:
            raise ValueError("sgs gflops_range chooses the bin width of each training batch: set scale=absolute and width=null")
    if config.noise_floor and config.similarity != "path":
        raise ValueError(f"sgs noise_floor is subtracted from the steps of similarity=path, not of {config.similarity}")


_REFERENCE = SGSConfig(
    after="res2",
    before_activation=True,
    similarity="distance_to_mean",
    kernel="linear",
    scale="relative",
    order="similarity",
    embedding="mlp",
    embed_from="features",
)

PRESETS = {
    "atfr": SGSConfig(),  # ours: the best cut of the clip into contiguous bins at a cost per bin
    "glance": SGSConfig(embedding="glance", embedding_dim=16, grid=16, kernel="middle", cost_exponent=0.0),  # cuts by an embedding that learns which change matters
    "reference": _REFERENCE,  # the released code of the paper, number for number
    "frozen": replace(_REFERENCE, embedding="frozen"),  # the same with an embedding that stays random
    "identity": SGSConfig(similarity="none"),  # keeps every feature
    "uniform": SGSConfig(similarity="uniform"),  # averages equal parts of the clip
    "stride": SGSConfig(similarity="stride"),  # keeps the middle frame of equal parts
    "random": SGSConfig(similarity="random"),  # keeps frames drawn at random, the same for all clips of a length
}
