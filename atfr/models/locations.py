"""Where SGS sits: from the names in `sgs.after` to paths of modules."""

from __future__ import annotations

import difflib
from typing import Mapping, Sequence

from torch import nn

from atfr.models.graph.tracing import INPUT

Stages = Mapping[str, "str | tuple[str, ...]"]  # name -> path of a module, or other names that are meant together


def resolve(names: Sequence[str], stages: Stages, network: nn.Module) -> dict[str, str]:
    """Return {layer name: module path} of the locations that `sgs.after` names.

    Raises:
        ValueError: a name is no stage and no path of a module, or two names are the same location.
    """
    locations: dict[str, str] = {}
    for name in names:
        target = stages.get(name, name)
        if isinstance(target, tuple):
            found = resolve(target, stages, network)
        else:
            try:
                network.get_submodule(target)
            except AttributeError:
                if target != INPUT:
                    raise ValueError(f"sgs.after={name!r} is not a stage of this network; {_possible(target, stages, network)}") from None
            found = {name: target}
        for twice in found.keys() & locations.keys():
            raise ValueError(f"sgs.after names the same location twice: {twice}")
        locations.update(found)
    return locations


def _possible(path: str, stages: Stages, network: nn.Module) -> str:
    """What there is in place of a path that does not exist: stages or top modules, and the paths most like it."""
    near = difflib.get_close_matches(path, [name for name, _ in network.named_modules() if name], n=5)
    like = f", such as {', '.join(near)}" if near else ""
    if stages:
        return f"choose one or a list of {', '.join((INPUT, *stages))}, or the path of a module{like}"
    return f"choose {INPUT}, the path of a module or a list of them; there are {', '.join(dict(network.named_children()))} and what is in them{like}"
