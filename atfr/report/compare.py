"""Compare runs: what distinguishes them, which differ in the seed alone, and which are best for their cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from atfr.engine.run.run_dir import NO_EFFECT
from atfr.report.runs import Results, Run
from atfr.utils.printable import one_line

FIXED = ("uniform", "stride", "random")  # similarities whose B' is the same for all clips
EQUAL = "-equal"  # behind the name of a method of which this was asked
SEED = "trainer.seed"
# Options of the machine, and those that follow from others.
_NOT_OF_THE_RUN = NO_EFFECT | {"dataset.root", "dataset.strip_prefix", "dataset.clip.cache", "dataset.make"}
_DERIVED = ("model.clip.", "model.clips.")
_BUDGETS = tuple(f"model.sgs.{name}" for name in ("gflops", "keep_ratio", "gflops_range", "num_bins", "width"))
_METHOD = ("model.sgs", "model.sgs._target_", "model.sgs.similarity")
# What follows from the run, not from how it was tested.
_OF_THE_RUN = ("checkpoint", "model", "execution", "commit", "decoders", "failed", "root", "lists")
# Of the clips that a network takes. Runs that differ in them can be compared.
OF_THE_CLIP = {"frames", "stride", "fps", "fallback_fps", "sampling", "crop_size", "test_short_side", "mean", "std", "decoder", "compile", "precision", "tf32"}
LONGEST = 60  # letters of a value


@dataclass(frozen=True)
class Estimate:
    """The mean over seeds, and its standard error where there are several."""

    mean: float
    error: float | None = None


@dataclass(frozen=True)
class Entry:
    """A row of the report: a tested run, or several that differ in the seed alone."""

    runs: tuple[Run, ...]
    label: str
    method: str
    options: dict[str, str]  # those that differ between the entries

    @property
    def kind(self) -> str:
        """`dense`, `fixed` or `adaptive`."""
        return kind(self.method)

    @property
    def results(self) -> tuple[Results, ...]:
        return tuple(run.results for run in self.runs if run.results is not None)

    @property
    def seeds(self) -> list[Any]:
        return [run.config[SEED] for run in self.runs if SEED in run.config]

    def over_seeds(self, value: Callable[[Results], float]) -> Estimate:
        """Average a value of the results over the seeds. The standard error is stdev / sqrt(n)."""
        values = [value(results) for results in self.results]
        return Estimate(fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None)

    @property
    def top1(self) -> Estimate:
        return self.over_seeds(lambda results: results.top1)

    @property
    def gflops(self) -> Estimate:
        return self.over_seeds(lambda results: results.gflops)

    @property
    def share(self) -> Estimate:
        """GFLOPs in percent of the dense network's."""
        return self.over_seeds(lambda results: 100 * results.gflops / results.dense_gflops)

    @property
    def milliseconds(self) -> Estimate | None:
        """Measured time of a clip, 1000 / clips_per_second; None if a run has none."""
        if any(results.clips_per_second is None for results in self.results):
            return None
        return self.over_seeds(lambda results: 1000 / (results.clips_per_second or math.nan))

    @property
    def clips_per_second(self) -> Estimate | None:
        if any(results.clips_per_second is None for results in self.results):
            return None
        return self.over_seeds(lambda results: results.clips_per_second or math.nan)


def method(config: Mapping[str, Any]) -> str:
    """Name the sampling of a run: `dense`, `atfr`, `glance`, either with `-equal` behind it, the name of a baseline, or that of another similarity."""
    similarity = config.get("model.sgs.similarity")
    name = {None: "dense", "none": "identity", "partition": "atfr"}.get(similarity, str(similarity))
    name = "glance" if config.get("model.sgs.embedding") == "glance" else name
    return f"{name}{EQUAL}" if config.get("model.sgs.same_number") else name


def kind(name: str) -> str:
    """Return whether a method is `dense`, `fixed` or `adaptive`."""
    return "dense" if name in ("dense", "identity") else "fixed" if name in FIXED or name.endswith(EQUAL) else "adaptive"


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the options that distinguish these runs beyond the method and the seed, budgets and those of the network first.

    An option that has one value for each method, network, dataset, optimizer or schedule follows from that choice, and is left
    out, except for budgets.
    """
    configs, found = [set_options(config) for config in configs], []
    for key in dict.fromkeys(key for config in configs for key in config):
        if key in _NOT_OF_THE_RUN or key == SEED or key in _METHOD or key.startswith(_DERIVED):
            continue
        values = {str(config[key]) for config in configs if key in config}
        by_choice: dict[str, set[str]] = {}
        for config in configs:
            by_choice.setdefault(_choice(key, config), set()).add(str(config.get(key)))
        if any(len(within) > 1 for within in by_choice.values()) or (len(values) > 1 and (key in _BUDGETS or key.endswith("._target_"))):
            found.append(key)
    return sorted(found, key=lambda key: (key not in _BUDGETS, not key.startswith("model.")))


def set_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out options that are null or false: a run from before an option existed equals one that does not use it."""
    return {key: value for key, value in config.items() if value is not None and value is not False}


def _choice(key: str, config: Mapping[str, Any]) -> str:
    """The value of the choice that an option belongs to."""
    if key.startswith("model.sgs."):
        return method(config)
    group = key.partition(".")[0]
    return "" if key.endswith("._target_") else str(config.get(f"{group}._target_"))


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Shorten option names to as many last parts as tell them apart; `model._target_` is `model`."""
    plain = {key: key.removesuffix("._target_") for key in keys}
    names = {}
    for key in keys:
        parts = plain[key].split(".")
        endings = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        others = [f".{plain[other]}" for other in keys if other != key]
        names[key] = next((ending for ending in endings if not any(other.endswith(f".{ending}") for other in others)), plain[key])
    return names


def options_of(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, str]:
    """Return the values of these options as text, without those that are null."""
    found = {}
    for key, name in names.items():
        value = config.get(key)
        if value is not None:
            text = str(value).rpartition(".")[2] if key.endswith("._target_") else str(value)
            found[name] = text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
    return found


def label_of(run: Run, names: Mapping[str, str]) -> str:
    """Name a run by its method and by the options that differ."""
    if not run.config:
        return one_line(run.name)
    options = ", ".join(f"{name}={value}" for name, value in options_of(run.config, names).items())
    return one_line(f"{method(run.config)} {options}".strip())


def untested(runs: Sequence[Run]) -> list[tuple[str, Run]]:
    """Return the runs without results, with the options that distinguish them from all others."""
    names = short_names(differing([run.config for run in runs if run.config]))
    return [(label_of(run, names), run) for run in runs if run.results is None]


def entries_of(runs: Sequence[Run]) -> list[Entry]:
    """Group the tested runs that differ in the seed alone; the entry with the highest top-1 comes first."""
    names = short_names(differing([run.config for run in runs if run.config and run.results is not None]))
    groups: list[list[Run]] = []
    for run in runs:
        if run.results is None:
            continue
        group = next((group for group in groups if _differ_in_seed(run, group)), None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    labels = [label_of(group[0], names) for group in groups]
    entries = []
    for group, label in zip(groups, labels):
        if labels.count(label) > 1:  # the same experiment twice
            label = one_line(f"{label} ({group[0].folder.name})")
        entries.append(Entry(tuple(group), label, method(group[0].config), options_of(group[0].config, names)))
    return sorted(entries, key=lambda entry: (-entry.top1.mean, entry.gflops.mean))


def _differ_in_seed(run: Run, group: Sequence[Run]) -> bool:
    """Return whether a run is another seed of a group."""
    if SEED not in run.config or any(run.config[SEED] == other.config.get(SEED) for other in group):
        return False
    return _experiment(run) == _experiment(group[0])


def _experiment(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    config = {key: value for key, value in set_options(run.config).items() if key not in _NOT_OF_THE_RUN and key != SEED}
    return config, protocol(run.results) if run.results else {}


def protocol(results: Results) -> dict[str, Any]:
    """Return how a run was tested: the part of its protocol that does not depend on the run."""
    found = {key: value for key, value in results.protocol.items() if key not in _OF_THE_RUN}
    if isinstance(found.get("videos"), Mapping):
        found["videos"] = found["videos"].get("test")
    return found


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points (cost, accuracy) that no other point beats, from the cheapest to the dearest.

    A point beats another if it is no dearer and no less accurate, and better in one of the two.
    """
    front: list[int] = []
    best = -math.inf
    for index in sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1])):
        cost, accuracy = points[index]
        if accuracy > best or (front and (cost, accuracy) == points[front[-1]]):
            front.append(index)
            best = accuracy
    return front
