"""Pretrained weights: files of other libraries and our own checkpoints, into any network that they fit.

Read are pytorchvideo's zoo files and PySlowFast's checkpoints (`model_state`), torchvision's state
dicts and our own checkpoints (`model`, with the averages of `ema` where there are some), whatever they
are called. Nothing in a file is run.

The kernels of a 2D network are inflated: repeated over time and divided by their length in time, so that the
network gives on a clip of one repeated image what the 2D network gives on the image (Carreira and Zisserman, "Quo vadis,
action recognition?", 2017; so do PySlowFast and MMAction2). A kernel with the 2D weights in its centre alone would do the
same, but its other weights would start at zero and see no motion.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Sequence

import torch
from torch import Tensor, nn

from atfr.models.pretrained import names as weight_names
from atfr.models.pretrained.published import similar_names
from atfr.models.video_net import VideoNet

CONTAINERS = ("model_state", "state_dict", "model")  # where a file may keep the state dict
WRAPPERS = ("module.", "_orig_mod.", "model.")  # what DistributedDataParallel, torch.compile and others put before names
COUNTER = "num_batches_tracked"  # of batch norms with a fixed momentum: not used, and not in every file
OURS = {"config", "choices", "class_names"}  # keys that no other library's file has
MISSING = "no such tensor in this network"
ZIP, LEGACY = b"PK\x03\x04", b"l\xfc\x9cF\xf9 j\xa8P\x19"  # how files of torch.save begin, since 1.6 and before


class Entry(NamedTuple):
    """A tensor, by the file's name for it if it was skipped, else by the network's."""

    name: str
    size: int  # values in it
    reason: str = ""  # why it was skipped
    inflated: bool = False


@dataclass(frozen=True)
class LoadReport:
    """What became of a file's tensors and of the network's, without batch norms' counters."""

    path: Path
    kind: str  # whose names the file uses
    loaded: tuple[Entry, ...]
    skipped: tuple[Entry, ...]  # in the file only, or of another shape, with the reason
    new: tuple[Entry, ...]  # in the network only: newly initialised
    notes: tuple[str, ...] = ()

    def as_table(self, *, most: int = 3) -> str:
        """A few lines to read: counts, sizes, the first names, and why tensors were skipped."""
        reasons: dict[str, list[Entry]] = {}
        for entry in self.skipped:
            reasons.setdefault(entry.reason, []).append(entry)
        groups = list(reasons.items())
        rows = [_row("loaded", self.loaded, most=most)]
        if inflated := [entry for entry in self.loaded if entry.inflated]:
            rows.append(_row("inflated", inflated, most=most, why="of these, 2D kernels repeated over time and divided by their length: "))
        rows += [_row("skipped", entries, most=most, why=f"{reason}: ") for reason, entries in groups[:most]] or [_row("skipped", (), most=most)]
        if groups[most:]:
            rows.append(_row("skipped", [entry for _, entries in groups[most:] for entry in entries], most=most, why="for other such reasons: "))
        rows.append(_row("new", self.new, most=most))
        return "\n".join([f"weights from {self.path} ({self.kind})", *rows, *(f"  {note}" for note in self.notes)])


def _row(what: str, entries: Any, *, most: int, why: str = "") -> str:
    names = ", ".join(entry.name for entry in entries[:most]) + (", ..." if len(entries) > most else "")
    millions = sum(entry.size for entry in entries) / 1e6
    return f"  {what:<8} {len(entries):>4} tensors {millions:>8.3f} M  {why}{names}".rstrip()


class File(NamedTuple):
    """What a file holds."""

    tensors: dict[str, Tensor]
    averaged: bool  # whether the averages of `trainer.ema` are in the place of the weights
    ours: bool  # whether it is a checkpoint of this project


class _Given(NamedTuple):
    name: str  # in the file
    value: Tensor


def load_pretrained(model: VideoNet, path: Path, *, key: str = "model.weights") -> LoadReport:
    """Copy into the network every tensor of the file that has its name and shape; `key` is the option that named the file.

    A classifier for another number of classes stays as it was initialised; so do a classifier and
    a sampling layer of which a part does not fit. The weights of a 2D network are inflated if each of them fits but
    for the classifier, which stays new. Where this raises, the network is untouched.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or fits less than half of the network; one line.
    """
    tensors, averaged, ours = read_tensors(path, key=key)
    given = _unwrapped({name: _Given(name, value) for name, value in tensors.items()})
    for_sgs = {name.removeprefix("sgs."): g for name, g in given.items() if name.startswith("sgs.")}
    for_network = {name: g for name, g in given.items() if not name.startswith("sgs.")}
    kind = "a checkpoint of this project" if ours else "names of pytorchvideo or torchvision"
    own = model.dense_network.state_dict()
    notes = ["these are the averaged weights (trainer.ema)"] if averaged else []
    if weight_names.is_pyslowfast(for_network):
        kind = "names of PySlowFast"
        for_network, notes = _from_pyslowfast(for_network, own)
    images = _is_2d(for_network) and any(value.dim() == 5 for value in own.values())
    if images and weight_names.is_image_resnet(for_network):
        kind = "names of torchvision's 2D ResNet"
        names = weight_names.image_resnet_to_pytorchvideo(for_network, own)
        for_network = {names[name]: g for name, g in for_network.items()}

    classifier = _classifier(model.dense_network)
    fitting, skipped = _match(own, for_network, classifier=classifier)
    inflated = {name for name in fitting if _inflates(for_network[name].value, own[name])}
    surplus = [name for name in for_network if name not in fitting and not _in(name, classifier) and not name.endswith(COUNTER)]
    _require_fit(own, for_network, fitting, surplus if inflated else [], classifier=classifier, images=images, file=f"{key}={path}")
    if inflated:
        for name in [name for name in fitting if _in(name, classifier)]:
            skipped.append(Entry(for_network[name].name, fitting.pop(name).numel(), "head of a 2D network replaced"))
    _all_or_none([name for name in own if _in(name, classifier)], fitting, for_network, skipped)
    unknown = sum(entry.reason == MISSING for entry in skipped)
    if 4 * unknown > len(fitting):
        notes.append(f"the file has {unknown} tensors that this network has no place for: is it of another model.size?")

    own_sgs, more_skipped = _open_to_files(model.sgs, for_sgs)
    fitting_sgs, unfit = _match(own_sgs, for_sgs, missing="no such tensor in this network's sampling" if model.sgs else "this network does not sample")
    for place in model.sgs:
        # A glance's classifier may be of other classes. A single number, such as a width, is something without the rest of its layer.
        classifies = [name for name in own_sgs if _in(name, f"{place}.embedding.classify")]
        rest = [name for name, value in own_sgs.items() if _in(name, place) and name not in classifies and (value.dim() or name.endswith(".embedding.steps"))]
        for together in (classifies, rest):
            _all_or_none(together, fitting_sgs, for_sgs, unfit)

    model.dense_network.load_state_dict(fitting, strict=False)
    model.sgs.load_state_dict(fitting_sgs, strict=False)
    found = set(fitting) | {f"sgs.{name}" for name in fitting_sgs}
    sizes = {name: value.numel() for name, value in own.items()} | {f"sgs.{name}": value.numel() for name, value in own_sgs.items()}
    entries = [Entry(name, size, inflated=name in inflated) for name, size in sizes.items() if not name.endswith(COUNTER)]
    return LoadReport(
        path,
        kind,
        loaded=tuple(entry for entry in entries if entry.name in found),
        skipped=(*skipped, *more_skipped, *unfit),
        new=tuple(entry for entry in entries if entry.name not in found),
        notes=tuple(notes),
    )


def read_tensors(path: Path, *, key: str = "model.weights") -> File:
    """Read the state dict that a file holds, on the CPU, without running code from it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file of torch.save, is damaged, or holds no tensors or more than tensors.
    """
    require_file(path, key)
    with open(path, "rb") as file:
        start = file.read(64)
    if not start.startswith(ZIP) and LEGACY not in start:
        raise ValueError(f"{key}={path} was not written by torch.save (Caffe2's .pkl files, as in older model zoos, are not read)")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make torch raise anything, OSError for a bad offset among it
        raise ValueError(f"{key}={path} {_why_unread(error)}") from error
    for candidate in [*(contents.get(key) for key in CONTAINERS), contents] if isinstance(contents, Mapping) else []:
        if isinstance(candidate, Mapping):
            tensors = {name: value for name, value in candidate.items() if isinstance(name, str) and isinstance(value, Tensor)}
            if tensors:
                averages = _averages(contents)
                return File({**tensors, **averages}, bool(averages), OURS <= contents.keys())
    holds = f"it has the keys {_some(map(str, contents))}" if isinstance(contents, Mapping) else f"it is a {type(contents).__name__}"
    raise ValueError(f"{key}={path} holds no weights: {holds}; names and tensors may be all of it, or under {', '.join(CONTAINERS)}")


def require_file(path: Path, key: str) -> None:
    """Raise FileNotFoundError unless there is this file, which the option `key` named."""
    if not path.is_file():
        meant = similar_names(str(path))
        raise FileNotFoundError(f"{key}={path} does not exist, or is not a file" + (f"; did you mean {' or '.join(meant)}?" if meant else ""))


def _averages(contents: Mapping) -> dict[str, Tensor]:
    """The averaged weights of a checkpoint of ours, by name."""
    averages = contents["ema"].get("averages") if isinstance(contents.get("ema"), Mapping) else None
    return dict(averages) if isinstance(averages, Mapping) else {}


def _why_unread(error: Exception) -> str:
    """torch.load's error in a few words."""
    text = str(error)
    if "TorchScript" in text:
        return "is not read: it is a TorchScript program; save the state_dict() of its model"
    if found := re.search(r"Unsupported global: GLOBAL (\S+)|Unsupported class (\S+)", text):
        return f"is not read: besides tensors it holds {found[1] or found[2]}, which could run code; save its state_dict() alone"
    detail = text.partition("WeightsUnpickler error:")[2].strip() or text.strip() or type(error).__name__
    return f"cannot be read: it is damaged ({detail.splitlines()[0].split('. ')[0][:200]})"


def _unwrapped(given: dict[str, _Given]) -> dict[str, _Given]:
    """Without the prefixes that wrappers put before a network's names."""
    while given:
        prefix = next((p for p in WRAPPERS if 2 * sum(name.startswith(p) for name in given) > len(given)), None)
        if prefix is None:
            break
        given = {name.removeprefix(prefix): g for name, g in given.items()}
    return given


def _from_pyslowfast(given: dict[str, _Given], own: Mapping[str, Tensor]) -> tuple[dict[str, _Given], list[str]]:
    """The tensors by pytorchvideo's names, and what there is to say about them."""
    names = weight_names.to_pytorchvideo(given, own)
    given = {names[name]: g for name, g in given.items()}
    notes = []
    for block in weight_names.shortcut_norms(given, own):
        try:
            changed = weight_names.fold_shortcut_norm({name: g.value for name, g in given.items()}, block)
        except KeyError:
            continue  # an incomplete file: its norm is listed among what was skipped
        norm = given[f"{block}.branch1_norm.weight"].name.removesuffix(".weight")
        notes.append(f"{norm} is folded into {block}, which has no norm there: the same in evaluation")
        given = {name: g for name, g in given.items() if not name.startswith(f"{block}.branch1_norm.")}
        given |= {name: _Given(given[name].name, value) for name, value in changed.items()}
    return given, notes


def _classifier(network: nn.Module) -> str:
    """The name of the last layer that has weights: in all of these networks the classifier."""
    return [name for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv3d))][-1]


def _in(name: str, module: str | None) -> bool:
    return module is not None and name.startswith(f"{module}.")


def _match(
    own: Mapping[str, Tensor], given: Mapping[str, _Given], *, classifier: str | None = None, missing: str = MISSING
) -> tuple[dict[str, Tensor], list[Entry]]:
    """The tensors that fit, by the network's names, and the others with the reason why not."""
    fitting: dict[str, Tensor] = {}
    skipped = []
    for name, (file_name, value) in given.items():
        if name not in own:
            reason = missing
        elif _inflates(value, own[name]):
            fitting[name] = value.to(own[name].dtype)[:, :, None].expand_as(own[name]) / own[name].shape[2]
            continue
        elif _bare(value.shape) == _bare(own[name].shape):
            fitting[name] = value.reshape(own[name].shape)
            continue
        elif _in(name, classifier) and _bare(value.shape[1:]) == _bare(own[name].shape[1:]):
            reason = f"head of {value.shape[0]} classes replaced by one of {own[name].shape[0]}"
        else:
            reason = f"shape {list(value.shape)}, {list(own[name].shape)} in this network"
        if not file_name.endswith(COUNTER):
            skipped.append(Entry(file_name, value.numel(), reason))
    return fitting, skipped


def _inflates(value: Tensor, own: Tensor) -> bool:
    """Whether a tensor is the kernel of a 2D convolution and the network's own is the same with a length in time."""
    return value.dim() == 4 and own.dim() == 5 and value.shape == own.shape[:2] + own.shape[3:]


def _is_2d(given: Mapping[str, _Given]) -> bool:
    """Whether the tensors are those of a network of 2D convolutions."""
    sizes = {g.value.dim() for g in given.values()}
    return 4 in sizes and 5 not in sizes


def _bare(shape: torch.Size) -> tuple[int, ...]:
    """A shape without ones at its end: a linear layer and a convolution of one position are the same."""
    sizes = list(shape)
    while sizes and sizes[-1] == 1:
        sizes.pop()
    return tuple(sizes)


def _all_or_none(names: list[str], fitting: dict[str, Tensor], given: Mapping[str, _Given], skipped: list[Entry]) -> None:
    """Take the named tensors out of `fitting` unless all of them are there."""
    if all(name in fitting or name.endswith(COUNTER) for name in names):
        return
    for name in names:
        if fitting.pop(name, None) is not None and not name.endswith(COUNTER):
            skipped.append(Entry(given[name].name, given[name].value.numel(), "not loaded without the tensors beside it, which do not fit"))


def _open_to_files(sgs: nn.ModuleDict, given: dict[str, _Given]) -> tuple[dict[str, Tensor], list[Entry]]:
    """The tensors of the sampling that a file may set. A width that is an option is taken out of both."""
    own, skipped = sgs.state_dict(), []
    for place, layer in sgs.items():
        name = f"{place}.width"
        for values in (own, given):
            values.pop(f"{place}._extra_state", None)  # the budget is an option of this network
        if name in own and not layer.tracks_width:
            own.pop(name)
            if name in given:
                skipped.append(Entry(given.pop(name).name, 1, "sgs.width is set"))
    return own, skipped


def _require_fit(
    own: Mapping[str, Tensor], given: Mapping[str, _Given], fitting: Mapping[str, Tensor], surplus: Sequence[str], *, classifier: str, images: bool, file: str
) -> None:
    """Raise ValueError, with what the file and the network hold, if less than half of the network is in the file or the file has a `surplus`."""
    wanted = [name for name in own if not _in(name, classifier) and not name.endswith(COUNTER)]
    found = sum(name in fitting for name in wanted)
    if 2 * found >= len(wanted) and not surplus:
        return
    first = next(name for name in (*wanted, *surplus) if name not in fitting)
    there, here = (list(values[first].shape) if first in values else "missing" for values in ({name: g.value for name, g in given.items()}, own))
    way_out = "choose the model and model.size that it was trained with"
    if images:
        way_out = "2D weights are inflated only into a network of the same shape, as those of a ResNet-50 into model=c2d, i3d or slow"
    raise ValueError(
        f"{file} is of another network: {found} of {len(wanted)} tensors fit (first difference: {first} is {there} there, {here} here);"
        f" the file holds {_some(g.name for g in given.values())}, the network has {_some(wanted)}; {way_out}"
    )


def _some(names: Any, most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
