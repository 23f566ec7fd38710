"""What happens when an image cannot be read, in the main process or in a DataLoader worker.

In training a corrupt image is replaced by another of its class (by any other, where images have several labels), chosen by (seed, key)
alone, so that neither the number of workers nor a restart changes the stream. In evaluation its row gets the target -1 and is not counted.
Either way the failure travels with the batch to the main process, which reports and counts it (``data/loading/loader.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import get_worker_info

from data import seeds
from data.errors import DataError, UnreadableImage
from data.loading.sampler import Key
from data.sources.base import Source

_MAX_REPLACEMENTS = 64  # images of the class that are tried
# Added to the copy number in a replacement's key: its augmentation differs from that of its own appearance in the epoch.
REPLACEMENT = 1 << 20


class Failure(NamedTuple):
    """An image that could not be read: its index in the source, its name, and why."""

    index: int
    path: str
    reason: str


class CorruptImagePolicy:
    """Reads samples, and records which image is being read, so that a read that hangs can be named.

    Attributes:
        reading: (max(1, workers),) int64: the image that each DataLoader worker is reading, -1 for none; in shared memory.
    """

    def __init__(self, source: Source, workers: int):
        self.source = source
        self.reading = torch.full((max(1, workers),), -1, dtype=torch.int64)
        if workers:
            self.reading.share_memory_()

    def _read(self, key: Any, index: int, get: Callable[[Any], Any]) -> Any:
        worker = get_worker_info()
        slot, reading = worker.id if worker else 0, self.reading.numpy()
        reading[slot] = index
        try:
            return get(key)
        finally:
            reading[slot] = -1


class ReplaceCorrupt(CorruptImagePolicy):
    """Training images by key; a corrupt one is replaced by another of its class, or by any other where an image has no one class."""

    def __init__(self, source: Source, workers: int, seed: int, by_class: bool = True):
        super().__init__(source, workers)
        self.seed, self._alike = seed, by_class and source.labels is None
        self._groups = source.targets if self._alike else np.zeros_like(source.targets)
        self._by_class = np.argsort(self._groups, kind="stable")
        self._ends = np.cumsum(np.bincount(self._groups, minlength=len(source.classes)))

    def read(self, key: Key, failures: list[Failure], get: Callable[[Key], Any]) -> Any:
        """``get(key)``, or of a replacement's key where that image cannot be read; every failure is appended to ``failures``.

        Raises:
            DataError: no replacement can be read either.
        """
        epoch, index, copy = key
        try:
            return self._read(key, index, get)
        except UnreadableImage as error:
            failures.append(Failure(index, error.path, error.reason))
        for other in self._replacements(key):
            try:
                return self._read((epoch, other, copy + (index + 1) * REPLACEMENT), other, get)
            except UnreadableImage as error:
                failures.append(Failure(other, error.path, error.reason))
        last = failures[-1]
        alike = "" if not self._alike else f" of its class {self.source.classes[self.source.targets[index]]!r}"
        raise DataError(f"{last.path}: not a readable image ({last.reason}), nor is any other{alike} that was tried; repair the folder")

    def _replacements(self, key: Key) -> list[int]:
        target = int(self._groups[key[1]])
        low, high = int(self._ends[target - 1]) if target else 0, int(self._ends[target])
        order = np.random.RandomState(seeds.derive32(self.seed, seeds.REPLACE, *key)).permutation(high - low)
        chosen = self._by_class[low + order[:_MAX_REPLACEMENTS + 1]]
        return [int(other) for other in chosen if other != key[1]][:_MAX_REPLACEMENTS]


class SkipCorrupt(CorruptImagePolicy):
    """Evaluation images by index; a corrupt one is not replaced."""

    def read(self, index: int, failures: list[Failure], get: Callable[[int], Any]) -> Any:
        """``get(index)``, or None where the image cannot be read; the failure is appended to ``failures``."""
        try:
            return self._read(index, index, get)
        except UnreadableImage as error:
            failures.append(Failure(index, error.path, error.reason))
            return None
