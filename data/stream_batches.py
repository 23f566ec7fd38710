"""Steps of a stream: which record is in which step, and the batches that loading processes make of the records they are handed."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch

from data.errors import DataError, UnreadableImage
from data.guard import Failure
from data.images import Batch, _Images, seed_generators
from data.pipeline import Pipeline
from data.sampler import Key, StepSampler
from data.streams import OneImage, Record, Stream

_SPARES = 4  # records after a step's own, for images of it that cannot be read
_REPLACED = 1 << 20
_AHEAD = 2  # steps read before they are asked for
T = TypeVar("T")


class Item(NamedTuple):
    """A record as a loading process is handed it: the key of its augmentation, and its number in the classifier."""

    key: Key
    record: Record
    target: int


class Step(NamedTuple):
    """A rank's part of a step, and the records that follow in the stream."""

    items: list[Item]
    spares: list[Item]


class StreamSampler(StepSampler):
    """Batch sampler of a training stream: ``StepSampler``'s steps, of records in the order in which they come.

    A key is (epoch, position in the epoch, 0). Beginning in the middle of an epoch reads past what was before, undecoded.

    Args:
        thread: read ahead. Only beside loading processes: where images are augmented in this one, nothing else may draw random
            numbers, and the packages that read streams might.
    """

    def __init__(self, stream: Stream, global_batch: int, epochs: int, seed: int, rank: int, world_size: int, buffer: int,
                 thread: bool, timeout: float):
        super().__init__(len(stream), global_batch, epochs, seed, rank, world_size)
        self.stream, self.buffer, self.thread, self.timeout = stream, buffer, thread, timeout

    def __iter__(self) -> Iterator[list[Step]]:
        return ahead(self._steps(), self.timeout, self.stream.root) if self.thread else self._steps()

    def keys(self, step: int, rank: int | None = None) -> list[Key]:
        epoch, within = divmod(step, self.steps_per_epoch)
        low, high = self._slice(self.rank if rank is None else rank)
        first = within * self.images_per_step
        return [(epoch, position, 0) for position in range(first + low, first + high)]

    def _steps(self) -> Iterator[list[Step]]:
        step = self.start
        while step < self.total_steps:
            epoch, within = divmod(step, self.steps_per_epoch)
            first = within * self.images_per_step
            records = islice(enumerate(self.stream.epoch(self.seed, epoch, self.buffer)), first, None)
            held: list[tuple[int, Record]] = []
            while step < (epoch + 1) * self.steps_per_epoch:
                size = self.images_per_step
                held += islice(records, size + _SPARES - len(held))
                if len(held) < size:
                    raise DataError(f"{self.stream.root}: the stream ended after {first + len(held)} images and not {self.size}; set "
                                    f"DATA.STREAM_IMAGES to {first + len(held)}")
                low, high = self._slice(self.rank)
                own, spares = ([Item((epoch, position, 0), record, self.stream.target(record)) for position, record in part]
                               for part in (held[low:high], held[high:high + _SPARES]))
                yield [Step(own, spares)]
                held, first = held[size:], first + size
                step += 1


class StreamShard:
    """Batch sampler of an evaluation stream: batch b goes to rank b modulo ranks; every rank has equally many, some perhaps empty.

    Its length is the number of batches where that is known, else 0; it is the same on all ranks, as the number itself is.
    """

    def __init__(self, stream: Stream, batch_size: int, rank: int, world_size: int, thread: bool, timeout: float):
        self.stream, self.batch_size, self.rank, self.world_size = stream, batch_size, rank, world_size
        self.thread, self.timeout = thread, timeout

    def __len__(self) -> int:
        return -(-len(self.stream) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[Step]]:
        return ahead(self._batches(), self.timeout, self.stream.root) if self.thread else self._batches()

    def _batches(self) -> Iterator[list[Step]]:
        records = enumerate(self.stream.records(range(len(self.stream.segments))))
        low = self.rank * self.batch_size
        while group := list(islice(records, self.batch_size * self.world_size)):
            own = group[low:low + self.batch_size]
            yield [Step([Item((0, position, 0), record, self.stream.target(record)) for position, record in own], [])]


def ahead(parts: Iterator[T], timeout: float, root: str) -> Iterator[T]:
    """``parts``, made by a thread a little before they are asked for.

    Raises:
        DataError: none came for ``timeout`` seconds (0: wait for ever); and whatever ``parts`` raises.
    """
    made: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(_AHEAD)
    ended = threading.Event()

    def put(what: tuple[T | None, BaseException | None]) -> None:
        while not ended.is_set():
            try:
                made.put(what, timeout=0.1)
                return
            except queue.Full:
                pass

    def run() -> None:
        try:
            for part in parts:
                put((part, None))
                if ended.is_set():
                    return
            put((None, None))
        except BaseException as error:
            put((None, error))

    threading.Thread(target=run, name="stream", daemon=True).start()
    try:
        while True:
            try:
                part, error = made.get(timeout=timeout or None)
            except queue.Empty:
                raise DataError(f"{root}: nothing came from the stream for {timeout:g} seconds (DATA.TIMEOUT); look at the network, or "
                                "raise DATA.TIMEOUT") from None
            if error is not None:
                raise error
            if part is None:
                return
            yield part
    finally:
        ended.set()


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
