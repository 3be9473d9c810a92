"""Whether this package's Triton kernels can run on a device."""

from __future__ import annotations

import importlib.util
import logging
from functools import lru_cache

import torch

log = logging.getLogger(__name__)

LEAST_CAPABILITY = (7, 5)  # of the GPUs that Triton supports


@lru_cache
def kernels_run_on(device: torch.device) -> bool:
    """Return whether Triton compiles kernels for this device; say so once if it does not for a GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    if importlib.util.find_spec("triton") is None:
        reason = "Triton is not installed"
    elif (capability := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
        reason = f"Triton needs compute capability {'.'.join(map(str, LEAST_CAPABILITY))}, and this GPU has {'.'.join(map(str, capability))}"
    else:
        return True
    log.warning("SGS runs without its own kernels on %s: the same results, slower. %s", device, reason)
    return False
