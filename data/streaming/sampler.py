"""Which records of a stream make which step."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple, TypeVar

from data.errors import DataError
from data.loading.sampler import Key, StepSampler
from data.streaming.stream import Record, Stream

_SPARES = 4  # records that follow a step's own and replace those that cannot be read
_STEPS_AHEAD = 2  # read before they are asked for
T = TypeVar("T")


class Item(NamedTuple):
    """A record as a DataLoader worker is handed it, with the key of its augmentation and its target."""

    key: Key
    record: Record
    target: int


class Step(NamedTuple):
    """A rank's part of a step, and the records that follow it in the stream."""

    items: list[Item]
    spares: list[Item]


class StreamSampler(StepSampler):
    """Batch sampler of a training stream: ``StepSampler``'s steps, of records in the order in which they are read.

    A key is (epoch, position in the epoch, 0). A start within an epoch reads and skips the records before it, undecoded.

    Args:
        buffer: records of the shuffle buffer.
        thread: read ahead in a thread. Only with DataLoader workers: where this process augments, nothing else in it may draw
            random numbers, and the packages that read streams might.
        timeout: seconds without a record after which that thread gives up.
        iterations: as of ``StepSampler``.
    """

    def __init__(self, stream: Stream, global_batch: int, epochs: int, seed: int, rank: int, world_size: int, buffer: int,
                 thread: bool, timeout: float, iterations: int = 0):
        super().__init__(len(stream), global_batch, epochs, seed, rank, world_size, iterations=iterations)
        self.stream, self.buffer, self.thread, self.timeout = stream, buffer, thread, timeout

    def __iter__(self) -> Iterator[list[Step]]:
        return read_ahead(self._steps(), self.timeout, self.stream.root) if self.thread else self._steps()

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
            pending: list[tuple[int, Record]] = []
            while step < min((epoch + 1) * self.steps_per_epoch, self.total_steps):
                size = self.images_per_step
                pending += islice(records, size + _SPARES - len(pending))
                if len(pending) < size:
                    raise DataError(f"{self.stream.root}: the stream ended after {first + len(pending)} images and not {self.size}; set "
                                    f"DATA.STREAM_IMAGES to {first + len(pending)}")
                low, high = self._slice(self.rank)
                own, spares = ([Item((epoch, position, 0), record, self.stream.target(record)) for position, record in part]
                               for part in (pending[low:high], pending[high:high + _SPARES]))
                yield [Step(own, spares)]
                pending, first = pending[size:], first + size
                step += 1


class StreamShardSampler:
    """Batch sampler of an evaluation stream: batch b goes to rank b modulo ranks; all ranks have equally many, some may be empty.

    Its length is the number of batches of a rank where the stream's size is known, else 0.
    """

    def __init__(self, stream: Stream, batch_size: int, rank: int, world_size: int, thread: bool, timeout: float):
        self.stream, self.batch_size, self.rank, self.world_size = stream, batch_size, rank, world_size
        self.thread, self.timeout = thread, timeout

    def __len__(self) -> int:
        return -(-len(self.stream) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[Step]]:
        return read_ahead(self._batches(), self.timeout, self.stream.root) if self.thread else self._batches()

    def _batches(self) -> Iterator[list[Step]]:
        records = enumerate(self.stream.records(range(len(self.stream.segments))))
        low = self.rank * self.batch_size
        while group := list(islice(records, self.batch_size * self.world_size)):
            own = group[low:low + self.batch_size]
            yield [Step([Item((0, position, 0), record, self.stream.target(record)) for position, record in own], [])]


def read_ahead(steps: Iterator[T], timeout: float, root: str) -> Iterator[T]:
    """``steps``, read by a thread a few ahead.

    Raises:
        DataError: none came for ``timeout`` seconds (0: wait for ever); and whatever ``steps`` raises.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(_STEPS_AHEAD)
    ended = threading.Event()

    def put(item: tuple[T | None, BaseException | None]) -> None:
        while not ended.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                pass

    def run() -> None:
        try:
            for step in steps:
                put((step, None))
                if ended.is_set():
                    return
            put((None, None))
        except BaseException as error:
            put((None, error))

    threading.Thread(target=run, name="stream", daemon=True).start()
    try:
        while True:
            try:
                step, error = ready.get(timeout=timeout or None)
            except queue.Empty:
                raise DataError(f"{root}: nothing came from the stream for {timeout:g} seconds (DATA.TIMEOUT); check the network, or "
                                "raise DATA.TIMEOUT") from None
            if error is not None:
                raise error
            if step is None:
                return
            yield step
    finally:
        ended.set()
