"""Steps of a stream: which record is in which step, and the batches that loading processes make of the records they are handed."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from data.errors import DataError, UnreadableImage
from data.loading.corrupt_images import Failure
from data.loading.dataset import Batch, _Images, seed_generators
from data.streaming.sampler import Item, Step
from data.streaming.stream import OneImage, Stream
from data.transforms.pipeline import Pipeline

_REPLACED = 1 << 20


class _StreamImages(_Images):
    """What both splits share: decoding the record of an item."""

    def __init__(self, stream: Stream, pipeline: Pipeline, workers: int, pipe: bool):
        super().__init__(stream, pipeline, pipe)
        self.one, self.guard = OneImage(stream.exif), _NoGuard(workers)

    def _decode(self, item: Item, out: torch.Tensor) -> Any:
        self.one.record = item.record
        return self.pipeline(self.one, item.key[1], out)


class _NoGuard:
    """No file is waited for in a loading process, so that none has to be named when it hangs."""

    def __init__(self, workers: int):
        self.reading = torch.full((max(1, workers),), -1, dtype=torch.int64)


def _failure(item: Item, error: UnreadableImage) -> Failure:
    """By its name, so that an image that comes again in another epoch counts once."""
    return Failure(int.from_bytes(hashlib.sha256(item.record.name.encode()).digest()[:7], "big"), error.path, error.reason)


class StreamTrainImages(_StreamImages):
    """Augmented records; everything random in a sample is a function of (seed, epoch, position)."""

    def __init__(self, stream: Stream, pipeline: Pipeline, seed: int, workers: int = 0, pipe: bool = False):
        super().__init__(stream, pipeline, workers, pipe)
        self.seed = seed

    def __getitems__(self, steps: list[Step]) -> Batch:
        (items, spares), failures = steps[0], []
        images = self._room(len(items))
        samples = [self._draw(items + spares, place, image, failures) for place, image in enumerate(images)]
        _, *rows, targets = zip(*samples, strict=True)
        return self._batch((images, *(torch.stack(row) for row in rows), torch.tensor(targets)), failures)

    def _draw(self, items: list[Item], place: int, out: torch.Tensor, failures: list[Failure]) -> tuple[Any, ...]:
        """The sample at ``place``, or of the next that can be read: those after it, then those before."""
        for tries, item in enumerate(items[place:] + items[:place]):
            epoch, position, copy = item.key
            seed_generators(self.seed, (epoch, position, copy + (items[place].key[1] + 1) * _REPLACED if tries else copy))
            try:
                image = self._decode(item, out)
            except UnreadableImage as error:
                failures.append(_failure(item, error))
                continue
            return (*image, item.target) if isinstance(image, tuple) else (image, item.target)
        first = failures[-1]
        raise DataError(f"{first.path}: not a readable image ({first.reason}), nor is any other of its step; repair the stream")


class StreamEvalImages(_StreamImages):
    """Records prepared for evaluation; a batch is filled up to ``batch_size`` rows of target -1, so is the row of a bad image."""

    def __init__(self, stream: Stream, pipeline: Pipeline, batch_size: int, workers: int = 0, pipe: bool = False):
        super().__init__(stream, pipeline, workers, pipe)
        self.batch_size = batch_size

    def __getitems__(self, steps: list[Step]) -> Batch:
        images, targets, failures = self._room(self.batch_size), torch.full((self.batch_size,), -1), []
        for row, item in enumerate(steps[0].items):
            try:
                self._decode(item, images[row])
                targets[row] = item.target
            except UnreadableImage as error:
                failures.append(_failure(item, error))
                images[row].zero_()
        images[len(steps[0].items):].zero_()
        return self._batch((images, targets), failures)
