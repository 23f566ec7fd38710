"""How long the computation has waited for data."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

_MANY = 64  # waits whose events are kept before those that are over are added up


class DataWait:
    """On a CPU: the time within ``with wait:``, in which the next batch is fetched."""

    def __init__(self) -> None:
        self._seconds = self._then = 0.0

    def __enter__(self) -> None:
        self._then = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds += time.perf_counter() - self._then

    def seconds(self) -> float:
        """The sum so far."""
        return self._seconds


class DeviceDataWait:
    """On CUDA: how long the GPU has stood idle for it.

    The host runs ahead of the GPU and spends its lead at the loader, so its own waiting says nothing. An event marks the end of the work
    given before the batch is fetched, another that the batch is there (``data.loading.device_prefetch`` has the stream wait for it). The
    GPU reaches the second at once after the first unless it waits for data. No event is waited for in a step.

    Args:
        event: makes an event that keeps the time.
    """

    def __init__(self, event: Callable[[], Any] = lambda: torch.cuda.Event(enable_timing=True)):
        self._event = event
        self._spare: list[Any] = []
        self._waits: list[tuple[Any, Any]] = []
        self._seconds = 0.0

    def __enter__(self) -> None:
        self._begin = self._record()

    def __exit__(self, *_: object) -> None:
        self._waits.append((self._begin, self._record()))
        if len(self._waits) > _MANY and self._waits[_MANY // 2][1].query():
            self._add_up(_MANY // 2)

    def seconds(self) -> float:
        """The sum so far, the last wait included: call it only where the device may be waited for."""
        if self._waits:
            self._waits[-1][1].synchronize()
            self._add_up(len(self._waits))
        return self._seconds

    def _record(self) -> Any:
        event = self._spare.pop() if self._spare else self._event()
        event.record()
        return event

    def _add_up(self, number: int) -> None:
        """The first ``number`` waits, which are over."""
        for begin, end in self._waits[:number]:
            self._seconds += begin.elapsed_time(end) / 1000
            self._spare += begin, end
        del self._waits[:number]


def data_wait(device: torch.device) -> DataWait | DeviceDataWait:
    """The form for ``device``."""
    return DeviceDataWait() if device.type == "cuda" else DataWait()
