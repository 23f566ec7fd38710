"""The images of a split as whole batches, each row written where the batch lies in memory."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from data import seeds
from data.loading.corrupt_images import Failure, ReplaceCorrupt, SkipCorrupt
from data.loading.sampler import Key
from data.sources.base import Source
from data.transforms.pipeline import Pipeline

T = TypeVar("T")


class Batch(NamedTuple):
    """What a DataLoader worker hands over.

    Attributes:
        parts: what the dataset's ``move`` takes: ``(images, targets)``, or ``(crops, augmentation parameters, targets)`` where the device
            augments: tensors in shared memory, or numpy arrays, which travel through a pipe.
        failures: images that could not be read.
        decoded: numbers of images decoded by the fast decoder and by Pillow.
    """

    parts: tuple[Any, ...]
    failures: list[Failure]
    decoded: tuple[int, int]


def seed_generators(seed: int, key: Key) -> None:
    """Seed the three global generators (Python's, numpy's, torch's), all of which timm's transforms draw from."""
    seed = seeds.derive(seed, seeds.AUGMENT, *key)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


def empty_in_shared_memory(shape: tuple[int, ...], dtype: torch.dtype, pipe: bool) -> Tensor:
    """An uninitialised tensor; in a DataLoader worker in shared memory from the start, so that it is never copied.

    Args:
        pipe: it travels through a pipe instead, and lies in ordinary memory.
    """
    if pipe or get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)


class BatchedImages(Dataset):
    """A source with the pipeline that makes tensors of its images; the base of training's and evaluation's datasets.

    Attributes:
        pipe: batches leave a DataLoader worker as numpy arrays through a pipe, not in shared memory.
        target_of: a sample's target as a function of its key, in place of its class; set it before the first batch.
    """

    target_of: Callable[[Key], int] | None = None

    def __init__(self, source: Source, pipeline: Pipeline, pipe: bool):
        self.source, self.pipeline, self.pipe = source, pipeline, pipe

    def _target(self, key: Key, label: int | np.ndarray) -> int | np.ndarray:
        return label if self.target_of is None else self.target_of(key)

    def _allocate(self, size: int) -> Tensor:
        """Uninitialised rows for ``size`` images."""
        return empty_in_shared_memory((size, *self.pipeline.shape), self.pipeline.dtype, self.pipe)

    def ahead(self, batches: Iterable[tuple[Any, ...]], device: torch.device,
              count: Callable[[list[Failure], tuple[int, ...]], None]) -> Iterable[tuple[Any, ...]]:
        """What is done to ``batches`` before ``move``, while earlier ones are used; as it stands, nothing.

        Args:
            count: takes images that turn out to be unreadable, and numbers of images decoded: as ``Batch.decoded``, then on the device.
        """
        return batches

    def move(self, parts: tuple[Any, ...], device: torch.device) -> Any:
        """``(images (B, 3, H, W) float, targets)`` on ``device`` of the ``parts`` of a batch."""
        images, *parameters, targets = parts  # the parameters, where the device augments, stay on the host
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        finish = self.pipeline.finish
        return images if finish is None else finish(images, *parameters), targets

    def _batch(self, parts: tuple[Tensor, ...], failures: list[Failure]) -> Batch:
        return Batch(tuple(part.numpy() for part in parts) if self.pipe else parts, failures, self.pipeline.counts())

    def _train_batch(self, items: Sequence[T], read: Callable[[T, Tensor, list[Failure]], tuple[Any, ...]]) -> Batch:
        """A batch of ``read(item, row, failures)`` for each item: (image, target) or (crop, parameters, target)."""
        images, failures = self._allocate(len(items)), []
        samples = [read(item, row, failures) for item, row in zip(items, images, strict=True)]
        _, *parameters, targets = zip(*samples, strict=True)
        return self._batch((images, *(torch.stack(rows) for rows in parameters), torch.from_numpy(np.array(targets))), failures)

    def _eval_batch(self, items: Iterable[T], size: int, read: Callable[[T, Tensor, list[Failure]], int | np.ndarray | None]) -> Batch:
        """A batch of ``size`` rows; ``read(item, row, failures)`` fills one and returns its target, or None: the row then counts as
        padding, which is zeros with the target -1, or of several labels -1 each."""
        images, failures, count = self._allocate(size), [], 0
        labels = self.source.labels if self.target_of is None else None
        targets = torch.full((size,), -1) if labels is None else torch.full((size, labels.table.shape[1]), -1, dtype=torch.int8)
        for item in items:
            target = read(item, images[count], failures)
            if target is None:
                images[count].zero_()
            else:
                targets[count] = torch.as_tensor(target)
            count += 1
        images[count:].zero_()
        return self._batch((images, targets), failures)


class TrainImages(BatchedImages):
    """Augmented training images by key; everything random in a sample is a function of (seed, key).

    A sample is ``(image, target)``, or ``(crop, augmentation parameters, target)`` where the device augments.
    """

    def __init__(self, source: Source, pipeline: Pipeline, seed: int, workers: int = 0, pipe: bool = False):
        super().__init__(source, pipeline, pipe)
        self.seed, self.corrupt_policy = seed, ReplaceCorrupt(source, workers, seed)

    def __getitem__(self, key: Key) -> tuple[Any, ...]:
        return self._read(key, None, [])

    def __getitems__(self, keys: list[Key]) -> Batch:
        return self._train_batch(keys, self._read)

    def _read(self, key: Key, row: Tensor | None, failures: list[Failure]) -> tuple[Any, ...]:
        return self.corrupt_policy.read(key, failures, functools.partial(self._sample, out=row))

    def _sample(self, key: Key, out: Tensor | None, prepare: Callable[[Source, int, Tensor | None], Any] | None = None) -> tuple[Any, ...]:
        index = key[1]
        seed_generators(self.seed, key)
        image = (prepare or self.pipeline)(self.source, index, out)
        target = self._target(key, self.source.target_of(index))
        return (*image, target) if isinstance(image, tuple) else (image, target)


class EvalImages(BatchedImages):
    """Images prepared for evaluation, by index.

    A batch always has ``batch_size`` rows, so that all have one shape: the last one is padded with rows of target -1, which
    is also the row of an image that cannot be read.
    """

    def __init__(self, source: Source, pipeline: Pipeline, batch_size: int, workers: int = 0, pipe: bool = False):
        super().__init__(source, pipeline, pipe)
        self.batch_size, self.corrupt_policy = batch_size, SkipCorrupt(source, workers)

    def __getitems__(self, indices: list[int]) -> Batch:
        return self._eval_batch(indices, self.batch_size, self._read)

    def _read(self, index: int, row: Tensor, failures: list[Failure]) -> int | np.ndarray | None:
        image = self.corrupt_policy.read(index, failures, lambda index: self.pipeline(self.source, index, row))
        return None if image is None else self._target((0, index, 0), self.source.target_of(index))
