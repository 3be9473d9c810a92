"""Copies batches to a GPU ahead of time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch

from atfr.data.types import ClipBatch

B = TypeVar("B", bound=ClipBatch)


def prefetched(batches: Iterable[B], device: torch.device) -> Iterator[B]:
    """Yield the batches with clips and labels on `device`. On a GPU the next batch is copied while the current one is used.

    The copy runs on a stream of its own: on that of the network it would wait for the whole step. Batches in pinned memory
    are copied without a wait of the host. On a CPU the batches are yielded as they come.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream, waiting = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(stream):
            clips, labels = (tensor.to(device, non_blocking=True) for tensor in (batch.clips, batch.labels))
            copied = stream.record_event()
        if waiting is not None:
            yield _taken_over(*waiting)
        waiting = replace(batch, clips=clips, labels=labels), copied  # type: ignore[type-var]
    if waiting is not None:
        yield _taken_over(*waiting)


def _taken_over(batch: B, copied: torch.cuda.Event) -> B:
    """Let the current stream wait for the copy, and keep the memory until that stream has used it."""
    current = torch.cuda.current_stream(batch.clips.device)
    current.wait_event(copied)
    for tensor in (batch.clips, batch.labels):
        tensor.record_stream(current)
    return batch
