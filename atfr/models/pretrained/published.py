"""Published weights by name, such as torchvision:r3d_18 or pytorchvideo:x3d_s, from the servers of the two libraries.

They are downloaded once, into the folder of torch.hub's checkpoints, where the libraries look for them, too.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import urllib.error
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import torch
import torchvision
from pytorchvideo.models.hub import csn, r2plus1d, resnet, slowfast, x3d

# The networks of `create_model` that have the parameters of each; a 2D network is inflated.
FITS: dict[str, tuple[str, ...]] = {
    "torchvision:r3d_18": ("r3d_18",),
    "torchvision:mc3_18": ("mc3_18",),
    "torchvision:r2plus1d_18": ("r2plus1d_18",),
    "torchvision:s3d": ("s3d_base",),
    "torchvision:resnet50": ("c2d_r50", "i3d_r50", "slow_r50"),
    **dict.fromkeys(("pytorchvideo:x3d_xs", "pytorchvideo:x3d_s", "pytorchvideo:x3d_m"), ("x3d_xs", "x3d_s", "x3d_m")),
    "pytorchvideo:x3d_l": ("x3d_l",),
    "pytorchvideo:slow_r50": ("slow_r50",),
    "pytorchvideo:c2d_r50": ("c2d_r50",),
    "pytorchvideo:i3d_r50": ("i3d_r50",),
    "pytorchvideo:slowfast_r50": ("slowfast_8x8_r50",),
    "pytorchvideo:slowfast_r101": ("slowfast_8x8_r101",),
    "pytorchvideo:csn_r101": ("csn_r101",),
    "pytorchvideo:r2plus1d_r50": ("r2plus1d_r50",),
}
LIBRARIES = ("torchvision:", "pytorchvideo:")
HASH = re.compile(r"-([0-9a-f]{8,})\.")  # in the names of torchvision's files: the start of their SHA-256
KINETICS_CLASSES = 400


@dataclass(frozen=True)
class Published:
    """Weights that can be downloaded.

    Attributes:
        mean, std: of the normalisation of the clips they were trained on.
        num_classes: of Kinetics-400, in alphabetical order; None for a 2D network, whose classes are not loaded.
    """

    name: str
    url: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int | None = KINETICS_CLASSES

    @property
    def file(self) -> Path:
        """Where torch.hub keeps the download."""
        return Path(torch.hub.get_dir(), "checkpoints", os.path.basename(self.url))

    def download(self, *, key: str = "weights", progress: bool = True) -> Path:
        """Return the file, downloaded if it is not there. Several processes may call this at the same time.

        Args:
            key: the option that named the weights.
            progress: print a line, and show a bar on a terminal.

        Raises:
            ValueError: there is no network, or the file is not the published one; one line.
        """
        if self.file.exists():
            return self.file
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if progress:
            print(f"downloading {self.url} to {self.file}", flush=True)
        start = HASH.search(self.file.name)
        try:
            torch.hub.download_url_to_file(self.url, str(self.file), hash_prefix=start and start[1], progress=progress and sys.stderr.isatty())
        except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: another hash
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            by_hand = f"put it at {self.file} by hand, from a machine with a network"
            raise ValueError(f"{key}={self.name}: {self.url} cannot be downloaded ({reason}); {by_hand}") from error
        return self.file

    def require_fit(self, network: str | None, *, key: str = "weights") -> None:
        """Raise ValueError, with the weights that there are, if these are of another network; `network` as in `create_model`.

        None is a network that `create_model` does not know.
        """
        fits = FITS[self.name]
        if network is None or network in fits:
            return
        there = " or ".join(names_for(network)) or "nothing published"
        raise ValueError(f"{key}={self.name} is for {' and '.join(fits)}, and this network is {network}; for that there is {there}")


def find_published(value: str, *, key: str = "weights") -> Published | None:
    """Return the published weights of that name; None if it is a path.

    Raises:
        ValueError: it begins with the name of a library, which has no such weights for these networks.
    """
    if not value.startswith(LIBRARIES):
        return None
    if value not in FITS:
        meant, of_library = similar_names(value), [name for name in FITS if name.startswith(value.partition(":")[0])]
        raise ValueError(f"{key}={value} does not exist; " + (f"did you mean {' or '.join(meant)}?" if meant else f"there are {', '.join(of_library)}"))
    library, _, name = value.partition(":")
    if library == "torchvision":
        weights = torchvision.models.get_model_weights(name).DEFAULT
        expected = weights.transforms()
        return Published(value, weights.url, tuple(expected.mean), tuple(expected.std), None if name == "resnet50" else KINETICS_CLASSES)
    urls = x3d.checkpoint_paths | resnet.checkpoint_paths | slowfast.checkpoint_paths | csn.checkpoint_paths | r2plus1d.checkpoint_paths
    return Published(value, urls[name], (0.45,) * 3, (0.225,) * 3)


def names_for(network: str | None) -> list[str]:
    """Return the published weights that fit a network of `create_model`, those of the same name first."""
    fitting = [name for name, networks in FITS.items() if network in networks]
    return sorted(fitting, key=lambda name: not name.endswith(f":{network}"))


def similar_names(value: str) -> list[str]:
    """Return up to three published names that `value`, with or without a library, may mean."""
    names = {name.partition(":")[2]: name for name in FITS}
    end = value.lower().replace("-", "_").rpartition(":")[2]
    close = [end] if end in names else difflib.get_close_matches(end, names, cutoff=0.75)
    return [names[name] for name in close]
