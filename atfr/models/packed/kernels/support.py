"""Where Triton kernels run."""

from __future__ import annotations

import logging

import torch

log = logging.getLogger(__name__)

CAPABILITY = (7, 5)  # of the oldest GPUs that Triton compiles for

_RUNS: dict[int | None, bool] = {}  # by the index of a GPU; a plain dictionary, which torch.compile can read


def triton_runs(device: torch.device) -> bool:
    """Return whether Triton kernels run on this device; why they do not run on a GPU is logged once."""
    if device.type != "cuda":
        return False
    if not torch.cuda.is_available():  # fake tensors
        return False
    if device.index not in _RUNS:
        reason = _obstacle(device)
        if reason is not None and False not in _RUNS.values():
            log.warning("networks run without Triton kernels, and slower: %s", reason)
        _RUNS[device.index] = reason is None
    return _RUNS[device.index]


def _obstacle(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "they were not tested on AMD GPUs"
    if (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}, and Triton needs {CAPABILITY[0]}.{CAPABILITY[1]}"
    try:
        import triton  # noqa: F401
    except Exception as error:  # of whatever type its libraries raise
        return f"Triton cannot be imported ({error})"
    return None
