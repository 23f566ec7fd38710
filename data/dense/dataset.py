"""The images of dense tasks as packed batches, which become ``DenseBatch``es on the device."""

from __future__ import annotations

from typing import Any

import torch

from data.dense.base import DenseSource
from data.dense.batch import DenseBatch
from data.dense.packing import Prepared, Unpack, pack
from data.dense.pipeline import EvalDensePipeline, TrainDensePipeline
from data.dense.transforms import Size
from data.errors import UnreadableImage
from data.loading.corrupt_images import Failure, ReplaceCorrupt, SkipCorrupt
from data.loading.dataset import Batch, BatchedImages, seed_generators
from data.loading.sampler import Key
from data.sources.base import Source


class DenseImages(BatchedImages):
    """The base of training's and evaluation's datasets.

    Attributes:
        stride: padded sizes are multiples of it.
        unpack: makes a ``DenseBatch`` of a packed one.
    """

    def __init__(self, source: Source, pipeline: Any, pipe: bool, stride: int, unpack: Unpack):
        super().__init__(source, pipeline, pipe)
        self.stride, self.unpack = stride, unpack

    def move(self, parts: tuple[Any, ...], device: torch.device) -> DenseBatch:
        return self.unpack(parts, device)

    def _packed(self, samples: list[Prepared], failures: list[Failure], **options: Any) -> Batch:
        buffer, layout = pack(samples, self.stride, pipe=self.pipe, **options)
        return Batch((buffer.numpy() if self.pipe else buffer, layout), failures, self.pipeline.counts())


class TrainDenseImages(DenseImages):
    """Augmented training images by key; everything random in a sample is a function of (seed, key).

    An image that cannot be read, or whose annotations cannot, is replaced by any other.

    Args:
        copy_paste: probability that objects of another image are pasted in.
        least: padded sizes are this or more (the crop's).
    """

    def __init__(self, source: DenseSource, pipeline: TrainDensePipeline, seed: int, stride: int, unpack: Unpack, workers: int = 0,
                 pipe: bool = False, copy_paste: float = 0.0, least: Size = (1, 1)):
        super().__init__(source, pipeline, pipe, stride, unpack)
        self.seed, self.copy_paste, self.least = seed, copy_paste, least
        self.corrupt_policy = ReplaceCorrupt(source, workers, seed, by_class=False)

    def __getitem__(self, key: Key) -> Prepared:
        return self._read(key, [])

    def __getitems__(self, keys: list[Key]) -> Batch:
        failures: list[Failure] = []
        return self._packed([self._read(key, failures) for key in keys], failures, least=self.least)

    def _read(self, key: Key, failures: list[Failure]) -> Prepared:
        return self.corrupt_policy.read(key, failures, lambda key: self._sample(key, failures))

    def _sample(self, key: Key, failures: list[Failure]) -> Prepared:
        index = key[1]
        seed_generators(self.seed, key)
        sample = self.pipeline.placed(self.source, index)
        if self.copy_paste and torch.rand(()) < self.copy_paste:
            other = int(torch.randint(len(self.source), ()))
            try:
                sample = self.pipeline.pasted(sample, self.pipeline.placed(self.source, other), self.source)
            except UnreadableImage as error:  # then nothing is pasted
                failures.append(Failure(other, error.path, error.reason))
        return self.pipeline.finished(sample, self.source, index)


class EvalDenseImages(DenseImages):
    """Images prepared for evaluation or prediction, by index; those of a batch have one padded size.

    An image that cannot be read is black and has the number -1.

    Args:
        sizes: (images, 2) heights and widths that the images must have; 0 where any will do.
    """

    def __init__(self, source: Source, pipeline: EvalDensePipeline, stride: int, unpack: Unpack, sizes: Any, workers: int = 0,
                 pipe: bool = False):
        super().__init__(source, pipeline, pipe, stride, unpack)
        self.sizes, self.corrupt_policy = sizes, SkipCorrupt(source, workers)

    def __getitems__(self, indices: list[int]) -> Batch:
        failures: list[Failure] = []
        return self._packed([self._read(index, failures) for index in indices], failures, flat_maps=True)

    def _read(self, index: int, failures: list[Failure]) -> Prepared:
        height, width = self.sizes[index].tolist()
        declared = (height, width) if height else None
        sample = self.corrupt_policy.read(index, failures, lambda index: self.pipeline.prepared(self.source, index, declared))
        return self.pipeline.missing(self.source.reading.channels, declared or (1, 1)) if sample is None else sample
