"""True streams: Hugging Face data sets (``datasets``) and WebDataset shards by URL (``webdataset``), both packages optional.

A stream is read in the process that trains, encoded image after encoded image; loading processes decode what they are handed. Its
order in an epoch is a function of (seed, epoch) alone: segments (shards) in a permuted order, then a shuffle buffer. Every process
reads the whole stream and keeps its part of each step, so neither the number of workers nor that of processes changes anything.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from data import seeds
from data.errors import DataError, UnreadableImage
from data.sources.base import Source


class Record(NamedTuple):
    """An image as the stream has it: its name for messages, the encoded file, and the stream's own label."""

    name: str
    data: bytes
    label: int | str


def is_stream(path: str) -> bool:
    """Whether ``path`` is a URL."""
    return re.match(r"\w+://", path) is not None


class Stream(Source):
    """The images of one split of a stream, each known only when it comes.

    Attributes:
        size: images of an epoch; None where nobody knows.
        segments: what is read one after the other; each call opens one from its beginning.
        classes: names that the stream gives its labels at first, those of the classifier in the end.
        targets: position in ``classes`` of each of the stream's own labels.
    """

    def __init__(self, root: str, segments: Sequence[Callable[[], Iterable[Record]]], size: int | None, names: list[str]):
        self.root, self.segments, self.size, self.classes, self.notices = root, segments, size, names, []
        self.targets, self.own = np.arange(len(names), dtype=np.int64), list(names)

    def __len__(self) -> int:
        return self.size or 0

    def path(self, index: int) -> str:
        return f"{self.root} (image {index} of the epoch)"

    def listing(self) -> bytes:
        return f"{self.root} {len(self.segments)} {self.size}".encode()

    def records(self, order: Iterable[int]) -> Iterator[Record]:
        """The records of the segments in ``order``. A read that fails is tried again where it stopped, for ``patience`` seconds.

        Raises:
            DataError: the stream cannot be read.
        """
        for segment in order:
            done, waited, pause = 0, 0.0, 0.05
            while True:
                try:
                    for record in itertools.islice(self.segments[segment](), done, None):
                        yield record
                        done, waited, pause = done + 1, 0.0, 0.05
                    break
                except Exception as error:  # curl's, tarfile's, pyarrow's, fsspec's and the hub's errors share no type
                    if isinstance(error, DataError):
                        raise
                    if waited >= self.patience:
                        words = " ".join(re.sub(r"<[^<>]* at 0x[0-9a-f]+>,?", "", str(error)).split())[:300]
                        words = words or type(error).__name__
                        raise DataError(f"{self.root}: the stream cannot be read ({words}); look at the network and the address, or raise "
                                        "DATA.READ_PATIENCE") from None
                pause = min(2 * pause, self.patience - waited)
                time.sleep(pause)
                waited += pause

    def epoch(self, seed: int, epoch: int, buffer: int) -> Iterator[Record]:
        """The records of a training epoch in its order, which (seed, epoch) determines."""
        generator = np.random.RandomState(seeds.derive32(seed, seeds.ORDER, epoch))
        held: list[Record] = []
        for record in self.records(generator.permutation(len(self.segments)).tolist()):
            if len(held) < buffer:
                held.append(record)
                continue
            place = generator.randint(buffer)
            yield held[place]
            held[place] = record
        for place in generator.permutation(len(held)).tolist():
            yield held[place]

    def target(self, record: Record) -> int:
        """The classifier's number of a record's class.

        Raises:
            DataError: it has none.
        """
        label = record.label
        if isinstance(label, str) and not label.isdecimal():
            label = self.own.index(label) if label in self.own else -1
        if 0 <= int(label) < len(self.targets):
            return int(self.targets[int(label)])
        raise DataError(f"{record.name}: its label {record.label!r} is none of the {len(self.targets)} classes; set MODEL.NUM_CLASSES or "
                        "DATA.CLASS_NAMES to what the stream has, or choose a split with labels")


class OneImage(Source):
    """The record in hand, as the pipelines know an image."""

    def __init__(self, exif: bool):
        self.exif, self.record = exif, Record("", b"", 0)

    def path(self, index: int) -> str:
        return self.record.name

    def read(self, index: int) -> bytes:
        if not self.record.data:
            raise UnreadableImage.of(self.record.name, "an empty file")
        return self.record.data
