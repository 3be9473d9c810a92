"""The options of an SGS layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Sequence

from atfr.models.sgs import functional

EMBEDDINGS = ("mlp", "pooled", "frozen")
EMBED_SOURCES = ("features", "clip")


@dataclass(frozen=True, kw_only=True)
class SGSConfig:
    """Where SGS sits in a network and which choices it is made of (`configs/model/sgs/`).

    The defaults are the `reference` preset: the released code, number for number.
    """

    after: str | Sequence[str] = "res2"  # stage or module path whose output is sampled, or several
    before_activation: bool = True  # sample the features before that stage's last ReLU
    num_bins: int | None = None  # B, the most bins a clip may keep; None: as many as there are frames
    similarity: str = "distance_to_mean"  # see atfr.models.sgs.functional
    metric: str = "l2"  # l2 | l1 | cosine | mahalanobis
    kernel: str = "linear"  # linear | linear_normalized | delta | delta_normalized | mean
    scale: str = "relative"  # relative to each clip's own range | absolute: one width for all clips
    edges: str = "released"  # released (2B) | inclusive (2B - 1)
    order: str = "similarity"  # of the kept bins: similarity | time
    embedding: str = "mlp"  # mlp (learned, as published) | frozen (the same, not learned) | pooled (no parameters)
    embedding_dim: int = 8  # D of the mlp
    grid: int = 4  # cells a side of the pooled embedding
    embed_from: str = "features"  # what z is taken from: the sampled features | the clip itself (not of a layer behind another one)
    width: float | None = None  # absolute scale: a fixed bin width; None: held to `target`
    target: float = 0.5  # mean B' / T that a width is held to, and what a baseline keeps without num_bins
    drawn: Sequence[float] | None = None  # train each batch at a mean B' / T drawn from this range, for all its budgets
    noise_floor: bool = False  # path: take the median step of the training clips off every step
    cost_exponent: float = 0.0  # partition: 0: one price a bin for all clips .. 1: in proportion to the clip's own change
    execution: str = "auto"  # of the network behind: auto | packed | bucketed

    def __post_init__(self) -> None:
        functional.check_choices(self.similarity, self.metric, self.kernel, self.scale, self.edges, self.order)
        for name, value, possible in (
            ("embedding", self.embedding, EMBEDDINGS),
            ("embed_from", self.embed_from, EMBED_SOURCES),
            ("execution", self.execution, ("auto", "packed", "bucketed")),
        ):
            if value not in possible:
                raise ValueError(f"sgs {name}={value!r} does not exist; choose one of {', '.join(possible)}")
        if not isinstance(self.after, (str, Sequence)) or not all(isinstance(place, str) for place in self.after):
            raise ValueError(f"sgs after={self.after!r} must be the name of a stage, the path of a module, or a list of these")
        if not self.places:
            raise ValueError("sgs after is empty: name a stage, or set model.sgs=null for the dense network")
        if self.kernel == "mean" and self.embedding == "mlp" and self.similarity not in functional.BASELINES:
            raise ValueError("sgs kernel=mean passes no gradient to a learned embedding, which would stay random: set embedding=pooled or frozen")
        if self.num_bins is not None and (not isinstance(self.num_bins, int) or self.num_bins < 1):
            raise ValueError(f"sgs num_bins must be a whole number of at least 1, not {self.num_bins!r}")
        if self.embedding_dim < 1 or self.grid < 1:
            raise ValueError(f"sgs embedding_dim ({self.embedding_dim}) and grid ({self.grid}) must be at least 1")
        if not 0 < self.target <= 1:
            raise ValueError(f"sgs target is a share of the frames, above 0 and at most 1, not {self.target}")
        if self.width is not None and not 0 < self.width < math.inf:
            raise ValueError(f"sgs width must be above 0, not {self.width}")
        if self.width is not None and self.scale != "absolute":
            raise ValueError("sgs width is one bin width for all clips, which scale=relative has not: set scale=absolute")
        if not 0 <= self.cost_exponent <= 1:
            raise ValueError(f"sgs cost_exponent={self.cost_exponent} must be from 0 to 1")
        if self.drawn is not None:
            if len(self.drawn) != 2 or not 0 < self.drawn[0] <= self.drawn[1] <= 1:
                raise ValueError(f"sgs drawn={list(self.drawn)} must be the least and the greatest share of the frames, above 0 and at most 1")
            if self.scale != "absolute" or self.width is not None:
                raise ValueError("sgs drawn chooses the width of each training batch: set scale=absolute and width=null")
        if self.noise_floor and self.similarity != "path":
            raise ValueError(f"sgs noise_floor is taken off the steps of similarity=path, not of {self.similarity}")

    @property
    def embeds_clip(self) -> bool:
        """Whether there is a z at all, and it is taken from the clip itself."""
        return self.embed_from == "clip" and self.similarity not in functional.BASELINES

    @property
    def places(self) -> tuple[str, ...]:
        """`after` as a tuple of names."""
        return (self.after,) if isinstance(self.after, str) else tuple(self.after)
