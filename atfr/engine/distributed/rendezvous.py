"""How processes that a launcher started find each other: at a store that the first of them keeps, or torchrun.

What is wrong with them is said here, before they talk to each other in collectives, which would hang. All waiting is
in Python, in short steps, so that a signal is answered meanwhile.
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

JOIN_S = 300.0  # seconds for all processes to be there
ANSWER = timedelta(seconds=20)  # for a store that is there
STEP_S = 0.1  # between two looks
FAILED = "failed"  # key of the store: a process that has failed


class OtherFailed(Exception):
    """Another process of this job ended, so that this one cannot go on. What was wrong is in the other's output."""


def meet(place: LaunchEnv, device: torch.device, number: int) -> dist.Store:
    """The store of all processes, once all of them are there and fit together. `number` counts the meetings of one launch.

    Raises:
        ValueError: a port in use, a process that does not come, different kinds of devices, or two
            processes on one GPU.
    """
    store = dist.PrefixStore(f"{place.attempt}/{number}", _store(place))
    store.set(f"process/{place.rank}", json.dumps(_account(device)))
    keys = [f"process/{rank}" for rank in range(place.world)]
    if not wait_until(lambda: store.check(keys), JOIN_S):
        missing = ", ".join(str(rank) for rank, key in enumerate(keys) if not store.check([key]))
        raise ValueError(f"process {place.rank} of {place.world} waited {JOIN_S:g} s for process {missing}, which did not start or came to another place than {place.address}:{place.port}")
    _require_devices([json.loads(store.get(key)) for key in keys])
    return store


@functools.cache
def _store(place: LaunchEnv) -> dist.TCPStore:
    who, where = f"process {place.rank} of {place.world}", f"{place.address}:{place.port}"
    make = functools.partial(dist.TCPStore, place.address, place.port, wait_for_workers=False, timeout=ANSWER)
    if place.keeps_store:
        try:
            return make(is_master=True)
        except dist.DistError as error:
            raise ValueError(f"{who} cannot wait for the others at {where}: {str(error).splitlines()[0]}; another program may use that port") from error
    if not wait_until(lambda: _answers(place), JOIN_S):
        raise ValueError(f"{who} found nobody at {where} within {JOIN_S:g} s: process 0 did not start, or that is not its machine's address")
    return _connected(make, f"{who} met something else than its job at {where}: another program uses that port")


def _connected(make: Callable[..., dist.TCPStore], problem: str) -> dist.TCPStore:
    """A client of the store, made in a thread of its own: it waits for an answer for ever, whatever its time-out."""
    stores, errors = [], []

    def connect() -> None:
        try:
            stores.append(make(is_master=False))
        except dist.DistError as error:
            errors.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(ANSWER.total_seconds())
    if not stores:
        raise ValueError(f"{problem} ({str(errors[0]).splitlines()[0] if errors else 'it does not answer'})")
    return stores[0]


def _answers(place: LaunchEnv) -> bool:
    try:
        socket.create_connection((place.address, place.port), timeout=5).close()
    except OSError:
        return False
    return True


def wait_until(done: Callable[[], bool], seconds: float) -> bool:
    """Whether it was so within `seconds`."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(STEP_S)
    return True


def _account(device: torch.device) -> dict[str, Any]:
    """What the others need to know of this process."""
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
    return {"device": device.type, "host": socket.gethostname(), "gpu": gpu}


def _require_devices(accounts: list[dict[str, Any]]) -> None:
    kinds, gpus = defaultdict(list), defaultdict(list)
    for rank, account in enumerate(accounts):
        kinds[account["device"]].append(f"{rank} ({account['host']})")
        gpus[account["host"], account["gpu"]].append(str(rank))
    if len(kinds) > 1:
        found = "; ".join(f"{kind} on rank {', '.join(ranks)}" for kind, ranks in sorted(kinds.items()))
        raise ValueError(f"the processes compute on different devices: {found}; set trainer.accelerator, or leave out the machine that shows no GPU")
    for (host, gpu), ranks in gpus.items():
        if gpu is not None and len(ranks) > 1:
            raise ValueError(f"ranks {', '.join(ranks)} have one GPU of {host} together: each needs one of its own; see LOCAL_RANK and CUDA_VISIBLE_DEVICES there")
