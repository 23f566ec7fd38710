"""Batches onto the device and finished there; on CUDA one batch ahead of the step, on a CUDA stream of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

HostBatch = tuple[Any, ...]
Move = Callable[[HostBatch, torch.device], Any]  # from what a DataLoader worker handed over to a batch, most of it on the device


def to_device(batches: Iterable[HostBatch], move: Move, device: torch.device) -> Iterator[Any]:
    """``move(batch, device)`` of each of ``batches``: tensors, or tuples of tensors, of which some may stay on the host."""
    moved = functools.partial(move, device=device)
    return _prefetched(batches, moved, device) if device.type == "cuda" else map(moved, batches)


def _prefetched(batches: Iterable[HostBatch], move: Callable[[HostBatch], Any], device: torch.device) -> Iterator[Any]:
    """The next batch is copied and augmented while the model computes its step on this one.

    The stream has a high priority (-1; lower numbers go first, and 0 is usual): its few short kernels are started between those of the
    step. With the usual priority they would wait behind the step's, which are always queued, and the next step would wait for them.
    """
    side, ready = torch.cuda.Stream(device, priority=-1), None
    for batch in batches:
        with torch.cuda.stream(side):
            following = move(batch), side.record_event()
        if ready is not None:
            yield _wait_for(*ready, device)
        ready = following
    if ready is not None:
        yield _wait_for(*ready, device)


def _wait_for(batch: Any, event: torch.cuda.Event, device: torch.device) -> Any:
    current = torch.cuda.current_stream(device)
    current.wait_event(event)
    for tensor in _tensors(batch):
        if tensor.is_cuda:
            tensor.record_stream(current)  # its memory is the side stream's; it must not be used again before the step is done
    return batch


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (tuple, list)):
        for part in batch:
            yield from _tensors(part)
