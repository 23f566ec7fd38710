"""A stream of images: encoded records read one after the other, in an order that the seed determines.

A stream is read in the process that trains, and the DataLoader workers decode the records they are handed. Its order in an
epoch is a function of (seed, epoch) alone: segments (shards) in a permuted order, then a shuffle buffer. Every process reads
the whole stream and keeps its part of each step, so the steps depend neither on the number of workers nor on that of processes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from data import seeds
from data.decoding.pillow import Reading, decode_pixels
from data.errors import DataError, UnreadableImage
from data.sources.base import Retry, Source
from data.sources.channel_statistics import LOOK, statistics, sums
from data.sources.classes import join_by_number, whole_number


class Record(NamedTuple):
    """An image of a stream: its name for messages, the encoded file, and the stream's own label."""

    name: str
    data: bytes
    label: int | str


def is_stream(path: str) -> bool:
    """Whether ``path`` is a URL."""
    return re.match(r"\w+://", path) is not None


class Stream(Source):
    """The images of one split of a stream; an image is known only once it has been read.

    Attributes:
        size: images of an epoch; None where it is unknown.
        segments: functions that each open one part of the stream (a shard) from its beginning.
        classes: the classifier's class names; until ``match_classes``, those of the stream's labels.
        targets: (labels,) int64: the position in ``classes`` of each of the stream's own labels.
        label_names: the names of the stream's own labels.
    """

    def __init__(self, root: str, segments: Sequence[Callable[[], Iterable[Record]]], size: int | None, names: list[str]):
        self.root, self.segments, self.size, self.classes, self.notices = root, segments, size, names, []
        self.targets, self.label_names = np.arange(len(names), dtype=np.int64), list(names)
        self._positions: dict[str, int] = {}

    def __len__(self) -> int:
        return self.size or 0

    def path(self, index: int) -> str:
        return f"{self.root} (image {index} of the epoch)"

    def identity(self) -> bytes:
        return f"{self.root} {len(self.segments)} {self.size}".encode()

    def sample(self) -> bytes:
        return b""  # reading ahead would cost a connection

    def records(self, order: Iterable[int]) -> Iterator[Record]:
        """The records of the segments in ``order``. A read that fails is tried again from the same record, for ``patience`` seconds.

        Raises:
            DataError: the stream cannot be read.
        """
        for segment in order:
            done, retry = 0, Retry(self.patience)
            while True:
                try:
                    for record in itertools.islice(self.segments[segment](), done, None):
                        yield record
                        done, retry = done + 1, Retry(self.patience)
                    break
                except DataError:
                    raise
                except Exception as error:  # curl's, tarfile's, pyarrow's, fsspec's and the hub's errors share no type
                    if not retry.wait():
                        words = " ".join(re.sub(r"<[^<>]* at 0x[0-9a-f]+>,?", "", str(error)).split())[:300]
                        words = words or type(error).__name__
                        raise DataError(f"{self.root}: the stream cannot be read ({words}); check the network and the address, or raise "
                                        "DATA.READ_PATIENCE") from None

    def measure(self) -> tuple[list[float], list[float]]:
        """(mean, standard deviation) of each channel of the images that the stream begins with.

        Raises:
            DataError: none of them can be read.
        """
        found, fault = [], None
        for record in itertools.islice(self.records(range(len(self.segments))), LOOK):
            try:
                found.append(sums(decode_pixels(record.data, record.name, self.reading)))
            except UnreadableImage as error:
                fault = error
        if not found:
            raise DataError(f"{self.root}: none of its first images can be read with {self.reading.channels} channels; {fault}")
        return statistics(found)

    def epoch(self, seed: int, epoch: int, buffer: int) -> Iterator[Record]:
        """The records of a training epoch in the order that (seed, epoch) determines, shuffled within ``buffer`` records."""
        generator = np.random.RandomState(seeds.derive32(seed, seeds.ORDER, epoch))
        buffered: list[Record] = []
        for record in self.records(generator.permutation(len(self.segments)).tolist()):
            if len(buffered) < buffer:
                buffered.append(record)
                continue
            place = generator.randint(buffer)
            yield buffered[place]
            buffered[place] = record
        for place in generator.permutation(len(buffered)).tolist():
            yield buffered[place]

    def target(self, record: Record) -> int:
        """The position in ``classes`` of a record's label.

        Raises:
            DataError: the label is none of the stream's classes.
        """
        label = record.label
        if isinstance(label, str):
            if label not in self._positions:
                at, number = int(join_by_number([label], self.label_names)[0]), whole_number(label)
                numbered = any(whole_number(name) is not None for name in self.label_names)
                self._positions[label] = at if at >= 0 or numbered or number is None else number  # a position only among names
            label = self._positions[label]
        if 0 <= label < len(self.targets):
            return int(self.targets[label])
        raise DataError(f"{record.name}: its label {str(record.label)!r} is none of the {len(self.targets)} classes; set MODEL.NUM_CLASSES "
                        "or DATA.CLASS_NAMES to what the stream has, or choose a split with labels")


class RecordSource(Source):
    """A source of one record at a time, for the pipelines, which read from a ``Source``."""

    def __init__(self, reading: Reading):
        self.reading, self.record = reading, Record("", b"", 0)

    def path(self, index: int) -> str:
        return self.record.name

    def read(self, index: int) -> bytes:
        if not self.record.data:
            raise UnreadableImage.of(self.record.name, "an empty file")
        return self.record.data
