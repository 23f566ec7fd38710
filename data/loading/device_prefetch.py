"""Batches onto the device and finished there; on CUDA one batch ahead of the step, on a CUDA stream of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

HostBatch, DeviceBatch = tuple[Tensor, ...], tuple[Tensor, Tensor]


def to_device(batches: Iterable[HostBatch], finish: Callable[..., Tensor] | None, device: torch.device) -> Iterator[DeviceBatch]:
    """``(images (B, 3, H, W) float, targets (B,))`` on ``device`` of each of ``batches``.

    Args:
        batches: ``(images, targets)`` or ``(crops, augmentation parameters, targets)`` on the host.
        finish: makes images of what is handed over (``Pipeline.finish``), on the device; None where they are images already.
    """
    move = functools.partial(_move, finish, device)
    return _prefetched(batches, move, device) if device.type == "cuda" else map(move, batches)


def _move(finish: Callable[..., Tensor] | None, device: torch.device, batch: HostBatch) -> DeviceBatch:
    images, *parameters, targets = batch  # the parameters, where the device augments, stay on the host
    images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
    return images if finish is None else finish(images, *parameters), targets


def _prefetched(batches: Iterable[HostBatch], move: Callable[[HostBatch], DeviceBatch], device: torch.device) -> Iterator[DeviceBatch]:
    """The next batch is copied and augmented while the model computes its step on this one."""
    side, ready = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(side):
            following = move(batch), side.record_event()
        if ready is not None:
            yield _wait_for(*ready, device)
        ready = following
    if ready is not None:
        yield _wait_for(*ready, device)


def _wait_for(batch: DeviceBatch, event: torch.cuda.Event, device: torch.device) -> DeviceBatch:
    current = torch.cuda.current_stream(device)
    current.wait_event(event)
    for tensor in batch:
        tensor.record_stream(current)  # its memory is the side stream's; it must not be used again before the step is done
    return batch
