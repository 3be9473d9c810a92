"""The work of the worker processes in tests, in a module that they import quickly."""

from __future__ import annotations

import ctypes
import os
import time


def work(item: str, heartbeat) -> str:
    if item == "crash":
        os._exit(3)
    if item == "hang":
        ctypes.PyDLL(None).usleep(60_000_000)  # with the interpreter lock held
    if item == "slow":
        for _ in range(8):
            time.sleep(0.1)
            heartbeat()
    if item == "wrong":
        raise ValueError("in\ntwo lines")
    return item.upper()
