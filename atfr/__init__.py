"""Adaptive temporal feature resolutions for video networks.

    model = atfr.create_model("x3d_s", num_classes=400, sgs="atfr")
    atfr.calibrate(model, clips, gflops=0.5)
    logits = model(clips)
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atfr.cli.classifier import load
    from atfr.engine.calibration import calibrate
    from atfr.models.factory import add_sgs, create_model
    from atfr.models.sgs.config import SGSConfig

__version__ = "0.1.0"
__all__ = ["SGSConfig", "__version__", "add_sgs", "calibrate", "create_model", "load"]

# fvcore and pytorchvideo call torch.jit.script when they are imported.
warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated", category=FutureWarning)

# Imported at their first use: torch and the networks take seconds, which `import atfr` need not.
_HOMES = {
    "SGSConfig": "atfr.models.sgs.config",
    "add_sgs": "atfr.models.factory",
    "calibrate": "atfr.engine.calibration",
    "create_model": "atfr.models.factory",
    "load": "atfr.cli.classifier",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'atfr' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
