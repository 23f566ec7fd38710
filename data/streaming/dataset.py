"""The batches that DataLoader workers make of the records they are handed."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import Tensor

from data.errors import DataError, UnreadableImage
from data.loading.corrupt_images import REPLACEMENT, CorruptImagePolicy, Failure
from data.loading.dataset import Batch, BatchedImages, seed_generators
from data.streaming.sampler import Item, Step
from data.streaming.stream import RecordSource, Stream
from data.transforms.pipeline import Pipeline


class _StreamImages(BatchedImages):
    """What both splits share: decoding the record of an item."""

    def __init__(self, stream: Stream, pipeline: Pipeline, workers: int, pipe: bool):
        super().__init__(stream, pipeline, pipe)
        self.record_source = RecordSource(stream.reading)
        self.corrupt_policy = CorruptImagePolicy(stream, workers)  # a worker reads no file here that could hang

    def _decode(self, item: Item, out: Tensor) -> Any:
        self.record_source.record = item.record
        return self.pipeline(self.record_source, item.key[1], out)


def _failure(item: Item, error: UnreadableImage) -> Failure:
    """Indexed by a hash of the image's name, so that one that comes again in another epoch counts once."""
    return Failure(int.from_bytes(hashlib.sha256(item.record.name.encode()).digest()[:7], "big"), error.path, error.reason)


class StreamTrainImages(_StreamImages):
    """Augmented records; everything random in a sample is a function of (seed, epoch, position)."""

    def __init__(self, stream: Stream, pipeline: Pipeline, seed: int, workers: int = 0, pipe: bool = False):
        super().__init__(stream, pipeline, workers, pipe)
        self.seed = seed

    def __getitems__(self, steps: list[Step]) -> Batch:
        items, spares = steps[0]
        candidates = items + spares
        return self._train_batch(range(len(items)), lambda place, row, failures: self._read(candidates, place, row, failures))

    def _read(self, items: list[Item], place: int, out: Tensor, failures: list[Failure]) -> tuple[Any, ...]:
        """The sample at ``place``, or the next one that can be read: of those after it, then of those before."""
        for tries, item in enumerate(items[place:] + items[:place]):
            epoch, position, copy = item.key
            seed_generators(self.seed, (epoch, position, copy + (items[place].key[1] + 1) * REPLACEMENT if tries else copy))
            try:
                image = self._decode(item, out)
            except UnreadableImage as error:
                failures.append(_failure(item, error))
                continue
            target = self._target(item.key, item.target)
            return (*image, target) if isinstance(image, tuple) else (image, target)
        last = failures[-1]
        raise DataError(f"{last.path}: not a readable image ({last.reason}), nor is any other of its step; repair the stream")


class StreamEvalImages(_StreamImages):
    """Records prepared for evaluation, in batches as ``EvalImages`` makes them."""

    def __init__(self, stream: Stream, pipeline: Pipeline, batch_size: int, workers: int = 0, pipe: bool = False):
        super().__init__(stream, pipeline, workers, pipe)
        self.batch_size = batch_size

    def __getitems__(self, steps: list[Step]) -> Batch:
        return self._eval_batch(steps[0].items, self.batch_size, self._read)

    def _read(self, item: Item, row: Tensor, failures: list[Failure]) -> int | None:
        try:
            self._decode(item, row)
            return self._target(item.key, item.target)
        except UnreadableImage as error:
            failures.append(_failure(item, error))
            return None
