"""The last stretch of a batch: from the loading processes to the device, finished there, one batch ahead on a stream of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

Batch = tuple[Tensor, Tensor]


class StreamLoader(DataLoader):
    """A DataLoader whose batches arrive finished: ``(images (B, 3, H, W) float, targets (B,))`` on ``device``.

    Args:
        finish: from what the workers hand over, images on the device, to finished images; None where they are finished already.
    """

    def __init__(self, *arguments: Any, device: torch.device, finish: Callable[..., Tensor] | None = None, pin_memory: bool = True,
                 **options: Any):
        super().__init__(*arguments, pin_memory=pin_memory and device.type == "cuda", **options)
        self.device, self.finish = device, finish

    def __iter__(self) -> Iterator[Batch]:
        inner = super().__iter__()
        return _CudaStream(inner, self.finish, self.device) if self.device.type == "cuda" else _Stream(inner, self.finish, self.device)


class _Stream:
    """Batches as they are asked for."""

    def __init__(self, inner: Iterator[Any], finish: Callable[..., Tensor] | None, device: torch.device):
        self.inner, self.finish, self.device = inner, finish, device

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self._finished(next(self.inner))

    def _finished(self, batch: Any) -> Batch:
        images, *rows, targets = batch  # rows of draws, where augmentation is the device's; they stay on the host
        images, targets = images.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)
        return images if self.finish is None else self.finish(images, *rows), targets


class _CudaStream(_Stream):
    """One batch ahead: its copy and its augmentation run beside the step that the model computes."""

    def __init__(self, inner: Iterator[Any], finish: Callable[..., Tensor] | None, device: torch.device):
        super().__init__(inner, finish, device)
        self.side = torch.cuda.Stream(device)
        self.ahead = self._fetch()

    def _fetch(self) -> Batch | None:
        try:
            batch = next(self.inner)
        except StopIteration:
            return None
        with torch.cuda.stream(self.side):
            return self._finished(batch)

    def __next__(self) -> Batch:
        if self.ahead is None:
            raise StopIteration
        batch, current = self.ahead, torch.cuda.current_stream(self.device)
        current.wait_stream(self.side)
        for tensor in batch:
            tensor.record_stream(current)  # its memory was the side stream's; it must not be reused before the step is done
        # The next batch is taken from the workers now; without it at hand the step would wait here, as it would without a stream.
        self.ahead = self._fetch()
        return batch
