"""Images that cannot be read: what happens instead, whichever process meets them.

In training a bad image is replaced by another of its class, chosen by (seed, key) alone, so that neither the number of
workers nor a restart changes the stream. In evaluation nothing replaces it: its row counts for nothing. Either way the
failure travels with the batch to the main process, which names and counts it (``data/loader.py``).
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

_TRIES = 64
_REPLACED = 1 << 20  # added to the copy number: a replacement is augmented unlike the image's own appearance in that epoch


class Failure(NamedTuple):
    """An image that could not be read: its number in the source, its name, and why."""

    index: int
    path: str
    reason: str


class _Guard:
    """Around what fetches a sample; says which image is being read, so that a hang can be named.

    Attributes:
        reading: the image that each loading process has in hand, -1 for none; the main process sees it.
    """

    def __init__(self, folder: Source, workers: int):
        self.folder = folder
        self.reading = torch.full((max(1, workers),), -1, dtype=torch.int64)
        if workers:
            self.reading.share_memory_()

    def _get(self, key: Any, index: int, get: Callable[[Any], Any]) -> Any:
        worker = get_worker_info()
        place, reading = worker.id if worker else 0, self.reading.numpy()
        reading[place] = index
        try:
            return get(key)
        finally:
            reading[place] = -1


class TrainGuard(_Guard):
    """Training images by key, a bad one replaced by a draw from its class."""

    def __init__(self, folder: Source, workers: int, seed: int):
        super().__init__(folder, workers)
        self.seed = seed
        self._by_class = np.argsort(folder.targets, kind="stable")
        self._ends = np.cumsum(np.bincount(folder.targets, minlength=len(folder.classes)))

    def draw(self, key: Key, failures: list[Failure], get: Callable[[Key], Any]) -> Any:
        """``get(key)``, or of another key where that image cannot be read; ``failures`` grows by what was met.

        Raises:
            DataError: nor can any other image of the class.
        """
        epoch, index, copy = key
        try:
            return self._get(key, index, get)
        except UnreadableImage as error:
            failures.append(Failure(index, error.path, error.reason))
        for other in self._replacements(key):
            try:
                return self._get((epoch, other, copy + (index + 1) * _REPLACED), other, get)
            except UnreadableImage as error:
                failures.append(Failure(other, error.path, error.reason))
        first = failures[-1]
        raise DataError(f"{first.path}: not a readable image ({first.reason}), nor is any other of its class "
                        f"{self.folder.classes[self.folder.targets[index]]!r} that was tried; repair the folder")

    def _replacements(self, key: Key) -> list[int]:
        target = int(self.folder.targets[key[1]])
        low, high = int(self._ends[target - 1]) if target else 0, int(self._ends[target])
        order = np.random.RandomState(seeds.derive32(self.seed, seeds.REPLACE, *key)).permutation(high - low)
        chosen = self._by_class[low + order[:_TRIES + 1]]
        return [int(other) for other in chosen if other != key[1]][:_TRIES]


class EvalGuard(_Guard):
    """Evaluation images by index; nothing stands in for a bad one."""

    def draw(self, index: int, failures: list[Failure], get: Callable[[int], Any]) -> Any:
        """``get(index)``, or None where the image cannot be read; ``failures`` grows by it."""
        try:
            return self._get(index, index, get)
        except UnreadableImage as error:
            failures.append(Failure(index, error.path, error.reason))
            return None
