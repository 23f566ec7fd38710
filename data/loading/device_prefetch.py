"""The last stretch of a batch: onto the device and finished there, on CUDA one batch ahead on a stream of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

Parts, Finished = tuple[Tensor, ...], tuple[Tensor, Tensor]


def finished(batches: Iterable[Parts], finish: Callable[..., Tensor] | None, device: torch.device) -> Iterator[Finished]:
    """``(images (B, 3, H, W) float, targets (B,))`` on ``device`` of each of ``batches``.

    Args:
        batches: ``(images, targets)`` or ``(crops, rows of draws, targets)`` on the host.
        finish: from what is handed over, images on the device, to finished images; None where they are finished already.
    """
    one = functools.partial(_finished, finish, device)
    return _ahead(batches, one, device) if device.type == "cuda" else map(one, batches)


def _finished(finish: Callable[..., Tensor] | None, device: torch.device, batch: Parts) -> Finished:
    images, *rows, targets = batch  # rows of draws, where augmentation is the device's; they stay on the host
    images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
    return images if finish is None else finish(images, *rows), targets


def _ahead(batches: Iterable[Parts], one: Callable[[Parts], Finished], device: torch.device) -> Iterator[Finished]:
    """The copy and the augmentation of the next batch run beside the step that the model computes on this one."""
    side, ready = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(side):
            following = one(batch), side.record_event()
        if ready is not None:
            yield _taken(*ready, device)
        ready = following
    if ready is not None:
        yield _taken(*ready, device)


def _taken(batch: Finished, event: torch.cuda.Event, device: torch.device) -> Finished:
    current = torch.cuda.current_stream(device)
    current.wait_event(event)
    for tensor in batch:
        tensor.record_stream(current)  # its memory is the side stream's; it must not be used again before the step is done
    return batch
