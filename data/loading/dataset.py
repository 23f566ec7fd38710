"""The images of a split as batches: every row is written where the batch lies, under a guard that deals with bad files."""

from __future__ import annotations

import functools
import math
import random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from data import seeds
from data.loading.corrupt_images import EvalGuard, Failure, TrainGuard
from data.loading.sampler import Key
from data.sources.base import Source
from data.transforms.pipeline import Pipeline


class Batch(NamedTuple):
    """What a loading process hands over.

    Attributes:
        parts: ``(images, targets)``, or ``(crops, rows of draws, targets)`` where the device augments: tensors in shared memory,
            or numpy arrays, which travel through a pipe.
        failures: images that could not be read.
        decoded: images decoded by the fast decoder, and by Pillow.
    """

    parts: tuple[Any, ...]
    failures: list[Failure]
    decoded: tuple[int, int]


def seed_generators(seed: int, key: Key) -> None:
    """Seed what augmentation draws from: timm's transforms use all three global generators."""
    seed = seeds.derive(seed, seeds.AUGMENT, *key)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


class _Images(Dataset):
    """A source and what makes samples of it.

    Attributes:
        pipe: batches leave a loading process as arrays, and nothing is put into shared memory.
    """

    def __init__(self, folder: Source, pipeline: Pipeline, pipe: bool):
        self.folder, self.pipeline, self.pipe = folder, pipeline, pipe

    def _room(self, size: int) -> Tensor:
        """Room for so many images; in a loading process it is shared with the main process from the start, and never copied."""
        shape, dtype = (size, *self.pipeline.shape), self.pipeline.dtype
        if self.pipe or get_worker_info() is None:
            return torch.empty(shape, dtype=dtype)
        storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
        return torch.empty(0, dtype=dtype).set_(storage, 0, shape)

    def _batch(self, parts: tuple[Tensor, ...], failures: list[Failure]) -> Batch:
        return Batch(tuple(part.numpy() for part in parts) if self.pipe else parts, failures, self.pipeline.counts())


class TrainImages(_Images):
    """Augmented training images by key; everything random in a sample is a function of (seed, key).

    A sample is ``(image, target)``, or ``(crop, row of draws, target)`` where the device augments.
    """

    def __init__(self, folder: Source, pipeline: Pipeline, seed: int, workers: int = 0, pipe: bool = False):
        super().__init__(folder, pipeline, pipe)
        self.seed, self.guard = seed, TrainGuard(folder, workers, seed)

    def __getitem__(self, key: Key) -> tuple[Any, ...]:
        return self.guard.draw(key, [], self._sample)

    def __getitems__(self, keys: list[Key]) -> Batch:
        images, failures = self._room(len(keys)), []
        samples = [self.guard.draw(key, failures, functools.partial(self._sample, out=image))
                   for key, image in zip(keys, images, strict=True)]
        _, *rows, targets = zip(*samples, strict=True)
        return self._batch((images, *(torch.stack(row) for row in rows), torch.tensor(targets)), failures)

    def _sample(self, key: Key, out: Tensor | None = None) -> tuple[Any, ...]:
        index = key[1]
        seed_generators(self.seed, key)
        image = self.pipeline(self.folder, index, out)
        target = int(self.folder.targets[index])
        return (*image, target) if isinstance(image, tuple) else (image, target)


class EvalImages(_Images):
    """Images prepared for evaluation, by index.

    A batch is filled up to ``batch_size`` rows of target -1, so that all have one shape; so is the row of an image that cannot be read.
    """

    def __init__(self, folder: Source, pipeline: Pipeline, batch_size: int, workers: int = 0, pipe: bool = False):
        super().__init__(folder, pipeline, pipe)
        self.batch_size, self.guard = batch_size, EvalGuard(folder, workers)

    def __getitems__(self, indices: list[int]) -> Batch:
        images, targets, failures = self._room(self.batch_size), torch.full((self.batch_size,), -1), []
        for row, index in enumerate(indices):
            if self.guard.draw(index, failures, lambda index, out=images[row]: self.pipeline(self.folder, index, out)) is None:
                images[row].zero_()
            else:
                targets[row] = int(self.folder.targets[index])
        images[len(indices):].zero_()
        return self._batch((images, targets), failures)
