"""The methods that the study (studies/claim/claim.py) compares: what a run is told beyond network, data and seed."""

from __future__ import annotations

from dataclasses import dataclass

WARM = "warm"  # the dense network that the other runs of a seed start from


@dataclass(frozen=True)
class Network:
    """What the runs of a network are told, all of which are sampled after the stem unless their method says otherwise."""

    model: str
    size: str
    times_epochs: int = 1  # of those that a dataset's experiment says


NETWORKS = {
    "x3d": Network("x3d", "tiny"),
    "r2plus1d": Network("r2plus1d", "tiny"),
    "resnet3d": Network("resnet3d", "tiny", times_epochs=2),  # after the experiment's six epochs some seeds are in the middle of learning uneven videos
    "resnet3d_18": Network("resnet3d", "18"),  # as the paper has it: its stem is about half as large a part of the whole as the tiny one's
}
KEEP_RATIOS = (0.25, 0.32, 0.34, 0.36, 0.4, 0.5)  # mean B' / T; half of the GFLOPs is .34 of resnet3d's features, .36 of x3d's and .4 of r2plus1d's
KEPT = (2, 3, 4, 5, 6, 7, 8, 11)  # features of 16
BUDGETS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # mean GFLOPs of dense that tools/calibrate.py aims at


@dataclass(frozen=True)
class Method:
    """One row of the study: what `tools/TOOL.py` is told."""

    overrides: tuple[str, ...]
    tool: str = "train"
    start: str | None = WARM  # the run whose weights it starts from; None: from scratch
    after: str | None = "stem"  # the location of the sampling layer; None: the network has none
    briefly: bool = False  # a third of the further epochs that the other runs have
    networks: tuple[str, ...] = tuple(NETWORKS)  # those that have such a location


def sampled(preset: str, *more: str, after: str = "stem", start: str | None = WARM, briefly: bool = False, networks: tuple[str, ...] = tuple(NETWORKS)) -> Method:
    return Method((f"model/sgs={preset}", *more), after=after, start=start, briefly=briefly, networks=networks)


def fixed(preset: str, kept: int, **where: str | None) -> Method:
    return sampled(preset, f"model.sgs.num_bins={kept}", **where)


def untrained(start: str, preset: str, *more: str, after: str = "stem") -> Method:
    return Method((f"model/sgs={preset}", *more, f"budgets={list(BUDGETS)}"), tool="calibrate", start=start, after=after)


def keep_ratio(value: float) -> str:
    return f"model.sgs.keep_ratio={value}"


def equally(kept: int) -> tuple[str, str]:
    """The options that keep `kept` features of every clip: at a price near 0 a clip keeps all that it may."""
    return f"model.sgs.num_bins={kept}", "model.sgs.width=1e-6"


AT_HALF = keep_ratio(0.4)  # of the features: with stem and sampling about half of the GFLOPs of r2plus1d
ANCHOR = ("model.sgs.similarity=anchor",)
PATH = ("model.sgs.similarity=path", "model.sgs.noise_floor=true")
FEATURES = "model.sgs.embed_from=features"
DRAWN = "model.sgs.gflops_range=[0.3,1]"  # 0.15 to 1 of the features after the stem
INPUT_DRAWN = "model.sgs.gflops_range=[0.15,1]"  # the same of the input frames
MEAN = "model.sgs.kernel=mean"
TWELVE = "model.sgs.num_bins=12"  # of which the published layer fills about half
REPAIRED = ("model.sgs.edges=inclusive", "model.sgs.kernel=linear_normalized", "model.sgs.order=time")
ABSOLUTE = (*REPAIRED[1:], "model.sgs.scale=absolute", AT_HALF)  # whose bins have no edges to choose
METHODS: dict[str, Method] = {
    WARM: Method((), start=None, after=None),
    "dense": Method((), after=None),
    "none": sampled("identity"),
    # The layer of model/sgs=atfr, and what keeps equally many features of all clips.
    **{f"atfr-{ratio}": sampled("atfr", keep_ratio(ratio)) for ratio in KEEP_RATIOS},
    **{f"{name}-{k}": fixed(name, k) for name in ("uniform", "stride", "random") for k in KEPT},
    # The same keeping middle frames, and with an embedding that learns which change matters.
    **{f"middle-{ratio}": sampled("atfr", "model.sgs.kernel=middle", keep_ratio(ratio)) for ratio in (0.36, 0.4)},
    **{f"glance-{ratio}": sampled("glance", keep_ratio(ratio)) for ratio in (0.32, 0.36, 0.4)},
    "glance-mean-0.36": sampled("glance", MEAN, keep_ratio(0.36)),
    # Cut by content into equally many parts of every clip: where to cut, without how many.
    **{f"equal-{k}": sampled("atfr", *equally(k)) for k in (6, 7)},
    **{f"glance-equal-{k}": sampled("glance", *equally(k)) for k in (6, 7)},
    # Its family, which looks at the features that it samples.
    **{f"features-{ratio}": sampled("atfr", FEATURES, keep_ratio(ratio)) for ratio in (0.32, 0.4)},
    "anchor-0.4": sampled("atfr", FEATURES, *ANCHOR, AT_HALF),
    "path-0.4": sampled("atfr", FEATURES, *PATH, AT_HALF),
    "one-price-0.4": sampled("atfr", FEATURES, "model.sgs.cost_exponent=0", AT_HALF),
    "one-price-0.32": sampled("atfr", FEATURES, "model.sgs.cost_exponent=0", keep_ratio(0.32)),
    "own-price-0.4": sampled("atfr", FEATURES, "model.sgs.cost_exponent=1", AT_HALF),
    "global-0.4": sampled("atfr", FEATURES, "model.sgs.grid=1", AT_HALF),
    # Its bins, with a z that is learned by the gradient of their kernel, and the same with one that is not.
    **{f"path-{embedding}-0.4": sampled("atfr", FEATURES, *PATH[:1], f"model.sgs.embedding={embedding}", "model.sgs.kernel=linear_normalized", AT_HALF) for embedding in ("mlp", "frozen")},
    # Other locations. Half of the GFLOPs leaves 2 (x3d), 3 (r2plus1d) or 5 (resnet3d) features after res2, and none or 2 (resnet3d) after res3.
    "early-0.37": sampled("atfr", FEATURES, keep_ratio(0.37), after="blocks.0.conv.conv_t", networks=("x3d",)),  # inside the stem, before its temporal convolution
    **{f"input-{ratio}": sampled("atfr", keep_ratio(ratio), after="input") for ratio in (0.32, 0.44)},
    **{f"input-{name}-{k}": fixed(name, k, after="input") for name in ("uniform", "stride") for k in KEPT},
    "res2-0.16": sampled("atfr", keep_ratio(0.16), after="res2"),
    "res2-0.32": sampled("atfr", keep_ratio(0.32), after="res2"),
    "res2-0.4": sampled("atfr", AT_HALF, after="res2"),
    **{f"res2-uniform-{k}": fixed("uniform", k, after="res2") for k in (2, 3, 5, 6)},
    "res3-0.4": sampled("atfr", AT_HALF, after="res3"),
    "res3-uniform-6": fixed("uniform", 6, after="res3"),
    # From scratch.
    "scratch-dense": Method((), start=None, after=None),
    "scratch-0.4": sampled("atfr", AT_HALF, start=None),
    "scratch-uniform-7": fixed("uniform", 7, start=None),
    "scratch-stride-6": fixed("stride", 6, start=None),
    # The published layer, one thing changed, or several.
    "reference": sampled("reference"),
    **{f"reference-{bins}": sampled("reference", f"model.sgs.num_bins={bins}") for bins in (8, 12)},
    **{f"reference-D{dim}-12": sampled("reference", TWELVE, f"model.sgs.embedding_dim={dim}") for dim in (4, 32)},
    "frozen-12": sampled("frozen", TWELVE),
    "delta-12": sampled("reference", TWELVE, "model.sgs.kernel=delta"),
    "mean-12": sampled("frozen", TWELVE, MEAN),  # no kernel that a learned embedding could learn by
    "time-12": sampled("reference", TWELVE, "model.sgs.order=time"),
    "inclusive-12": sampled("reference", TWELVE, "model.sgs.edges=inclusive"),
    "normalized-12": sampled("reference", TWELVE, "model.sgs.edges=inclusive", "model.sgs.kernel=linear_normalized"),
    "repaired-12": sampled("reference", TWELVE, *REPAIRED),
    "repaired-delta-12": sampled("reference", TWELVE, *REPAIRED, "model.sgs.kernel=delta_normalized"),
    "repaired-magnitude-12": sampled("reference", TWELVE, *REPAIRED, "model.sgs.similarity=magnitude"),
    **{f"repaired-{metric}-12": sampled("reference", TWELVE, *REPAIRED, f"model.sgs.metric={metric}") for metric in ("l1", "cosine", "mahalanobis")},
    "absolute-0.4": sampled("reference", *ABSOLUTE),
    "absolute-magnitude-0.4": sampled("reference", *ABSOLUTE, "model.sgs.similarity=magnitude"),
    # One network at many budgets, and no training at all.
    "drawn-0.36": sampled("atfr", DRAWN, keep_ratio(0.36)),
    "budgets-drawn-0.36": untrained("drawn-0.36", "atfr", "refresh_batch_norm=true"),
    "glance-drawn-0.36": sampled("glance", DRAWN, keep_ratio(0.36)),
    "budgets-glance-drawn-0.36": untrained("glance-drawn-0.36", "glance", "refresh_batch_norm=true"),
    "glance-mean-drawn-0.36": sampled("glance", MEAN, DRAWN, keep_ratio(0.36)),
    "budgets-glance-mean-drawn-0.36": untrained("glance-mean-drawn-0.36", "glance", MEAN, "refresh_batch_norm=true"),
    "features-drawn-0.4": sampled("atfr", FEATURES, DRAWN, AT_HALF),
    "budgets-features-drawn-0.4": untrained("features-drawn-0.4", "atfr", FEATURES, "refresh_batch_norm=true"),
    "input-drawn-0.44": sampled("atfr", INPUT_DRAWN, keep_ratio(0.44), after="input"),
    "budgets-input-drawn-0.44": untrained("input-drawn-0.44", "atfr", "refresh_batch_norm=true", after="input"),
    "budgets-features-0.4": untrained("features-0.4", "atfr", FEATURES, "refresh_batch_norm=true"),
    "untrained-atfr": untrained(WARM, "atfr"),
    "untrained-features": untrained(WARM, "atfr", FEATURES),
    "untrained-anchor": untrained(WARM, "atfr", FEATURES, *ANCHOR),
    "untrained-uniform": untrained(WARM, "uniform"),
    "untrained-stride": untrained(WARM, "stride"),
    "untrained-random": untrained(WARM, "random"),
    **{f"untrained-input-{name}": untrained(WARM, name, after="input") for name in ("atfr", "uniform", "stride")},
    # A third of the further epochs.
    "dense-briefly": Method((), after=None, briefly=True),
    "features-briefly": sampled("atfr", FEATURES, AT_HALF, briefly=True),
}
