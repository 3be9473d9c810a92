"""Rendezvous of the ranks that a launcher started, at a store hosted by rank 0 or by torchrun.

Errors are raised here, before the first collective, which would hang. All waiting is in Python, in short steps, so that signals
are handled meanwhile.
"""

from __future__ import annotations

import functools
import json
import socket
import threading
import time
from collections import defaultdict
from datetime import timedelta
from typing import Any, Callable

import torch
import torch.distributed as dist

from atfr.engine.distributed.launch_env import LaunchEnv

JOIN_S = 300.0  # seconds in which all ranks must join
STORE_TIMEOUT = timedelta(seconds=20)  # for an answer of the store
STEP_S = 0.1  # seconds between two checks
FAILED = "failed"  # key of the store: a rank has failed


class OtherFailed(Exception):
    """Another rank ended with an error, which is in its output, so this one cannot continue."""


def join_store(env: LaunchEnv, device: torch.device, number: int) -> dist.Store:
    """Return the store of all ranks, once all of them have joined and their devices are consistent.

    Args:
        number: counts the calls in one launch.

    Raises:
        ValueError: the port is in use, a rank does not join, the kinds of devices differ, or two ranks share a GPU.
    """
    store = dist.PrefixStore(f"{env.attempt}/{number}", _store(env))
    store.set(f"rank/{env.rank}", json.dumps(_device_info(device)))
    keys = [f"rank/{rank}" for rank in range(env.world)]
    if not wait_until(lambda: store.check(keys), JOIN_S):
        missing = ", ".join(str(rank) for rank, key in enumerate(keys) if not store.check([key]))
        raise ValueError(f"rank {env.rank} of {env.world} waited {JOIN_S:g} s for rank {missing}, which did not start or connected to another address than {env.address}:{env.port}")
    _check_devices([json.loads(store.get(key)) for key in keys])
    return store


@functools.cache
def _store(env: LaunchEnv) -> dist.TCPStore:
    who, where = f"rank {env.rank} of {env.world}", f"{env.address}:{env.port}"
    make = functools.partial(dist.TCPStore, env.address, env.port, wait_for_workers=False, timeout=STORE_TIMEOUT)
    if env.keeps_store:
        try:
            return make(is_master=True)
        except dist.DistError as error:
            raise ValueError(f"{who} cannot open {where} for the others: {str(error).splitlines()[0]}; another program may use that port") from error
    if not wait_until(lambda: _is_open(env), JOIN_S):
        raise ValueError(f"{who} could not connect to {where} within {JOIN_S:g} s: rank 0 did not start, or this is not the address of its machine")
    return _connected(make, f"{who} did not find its job at {where}: another program uses that port")


def _connected(make: Callable[..., dist.TCPStore], problem: str) -> dist.TCPStore:
    """Connect to the store in a thread, because connecting ignores the timeout and may wait forever."""
    stores, errors = [], []

    def connect() -> None:
        try:
            stores.append(make(is_master=False))
        except dist.DistError as error:
            errors.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(STORE_TIMEOUT.total_seconds())
    if not stores:
        raise ValueError(f"{problem} ({str(errors[0]).splitlines()[0] if errors else 'it does not answer'})")
    return stores[0]


def _is_open(env: LaunchEnv) -> bool:
    try:
        socket.create_connection((env.address, env.port), timeout=5).close()
    except OSError:
        return False
    return True


def wait_until(done: Callable[[], bool], seconds: float) -> bool:
    """Return whether `done` became true within `seconds`."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(STEP_S)
    return True


def _device_info(device: torch.device) -> dict[str, Any]:
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
    return {"device": device.type, "host": socket.gethostname(), "gpu": gpu}


def _check_devices(infos: list[dict[str, Any]]) -> None:
    """Raise ValueError unless all ranks have the same kind of device, and GPUs of their own."""
    kinds, gpus = defaultdict(list), defaultdict(list)
    for rank, info in enumerate(infos):
        kinds[info["device"]].append(f"{rank} ({info['host']})")
        gpus[info["host"], info["gpu"]].append(str(rank))
    if len(kinds) > 1:
        found = "; ".join(f"{kind} on rank {', '.join(ranks)}" for kind, ranks in sorted(kinds.items()))
        raise ValueError(f"the ranks have different devices: {found}; set trainer.accelerator, or leave out the machine without a GPU")
    for (host, gpu), ranks in gpus.items():
        if gpu is not None and len(ranks) > 1:
            raise ValueError(f"ranks {', '.join(ranks)} share one GPU of {host}, but each needs its own; check LOCAL_RANK and CUDA_VISIBLE_DEVICES there")
