"""True streams: Hugging Face data sets (``datasets``) and WebDataset shards by URL (``webdataset``), both packages optional.

A stream is read in the process that trains, encoded image after encoded image; loading processes decode what they are handed. Its
order in an epoch is a function of (seed, epoch) alone: segments (shards) in a permuted order, then a shuffle buffer. Every process
reads the whole stream and keeps its part of each step, so neither the number of workers nor that of processes changes anything.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from yacs.config import CfgNode

from config import ConfigError
from data import seeds
from data.archives import label_of
from data.classes import join
from data.errors import DataError, UnreadableImage
from data.layouts import SPLIT_NAMES, beside
from data.lists import read_text
from data.source import Source

_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
_ELSEWHERE = re.compile(r"(https?|hf|s3|gs)://|\w+://.*::(https?|hf|s3|gs)://")
_SCHEMES = ("https", "http", "s3", "gs", "file", "hf")


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


def open_streams(config: CfgNode, splits: Sequence[str], classes: Sequence[str] | None) -> dict[str, Stream]:
    """The streams of the splits asked for, under common class names.

    Args:
        classes: those of a checkpoint; None takes the stream's, else DATA.CLASS_NAMES, else numbers.

    Raises:
        ConfigError: a key is missing or does not go with a stream.
        DataError: it cannot be opened.
    """
    root, data = config.DATA.DATA_PATH, config.DATA
    for key, value, usual in (("DATA.SUBSET", data.SUBSET, 1.0), ("DATA.VAL_FRACTION", data.VAL_FRACTION, 0.0),
                              ("DATA.REPEATED_AUG", data.REPEATED_AUG, 1), ("DATA.ZIP_MODE", data.ZIP_MODE, False)):
        if value != usual:
            raise ConfigError(f"{key} {value} does not go with a stream ({root}); leave it at {usual}, or copy the data to a disk")
    listing = beside(data.CLASS_NAMES, ".")
    names = [line.partition("\t")[0].strip() for line in read_text(listing).splitlines() if line.strip()] if listing else []
    names = names or [str(number) for number in range(config.MODEL.NUM_CLASSES or len(classes or ()))]
    opened = {}
    for split in splits:
        if root.startswith("hf://") and data.VAL_PATH:
            raise ConfigError(f"DATA.VAL_PATH does not go with {root}, which holds both splits; leave it empty")
        path = root if split == "train" or root.startswith("hf://") else data.VAL_PATH
        if not path:
            raise ConfigError(f"{root}: is a stream of training images; give the shards of the validation images with DATA.VAL_PATH")
        stream = _hub(path, split, names) if path.startswith("hf://") else _shards(path, names)
        if not stream.classes:
            raise ConfigError(f"{path}: the stream does not name its classes; give MODEL.NUM_CLASSES, or DATA.CLASS_NAMES")
        if split == "train":
            stream.size = data.STREAM_IMAGES or stream.size
            if not stream.size:
                raise ConfigError(f"{path}: the stream does not say how many images it has; give the number of training images with "
                                  "DATA.STREAM_IMAGES")
        stream.patience, stream.exif = data.READ_PATIENCE, data.EXIF
        classes = list(classes) if classes is not None else stream.classes
        opened[split] = join(stream, classes)
        first = next(stream.records(range(len(stream.segments))), None)  # what is wrong with every image is told now
        if first is None:
            raise DataError(f"{stream.root}: holds no images; give another address")
        stream.target(first)
    if "train" in opened:
        opened["train"].notices.append(f"notice: {root} is a stream: resume is exact to the epoch only (in its middle the images that were "
                                       "seen are read past, which is exact if the stream still has the same order)")
    return opened


# --------------------------------------------------------------------------------------------------
# Hugging Face
# --------------------------------------------------------------------------------------------------

def _hub(path: str, split: str, names: list[str]) -> Stream:
    """``hf://owner/name``, ``hf://owner/name:config`` or ``hf:///a/folder/of/parquet/files``."""
    try:
        import datasets
        import fsspec  # comes with it
        from datasets import disable_progress_bars  # a folder of that name in the working directory can be imported, too
    except ImportError:
        raise ConfigError(f"{path}: is a Hugging Face stream, which needs the package datasets; pip install datasets") from None
    from data.huggingface import columns
    name, _, configuration = path[len("hf://"):].partition(":")
    disable_progress_bars()
    try:
        tables = datasets.load_dataset(name, configuration or None, streaming=True)
        found = next((n for n in SPLIT_NAMES[split] if n in tables), None)
        if found is None:
            raise DataError(f"{path}: has no {split} split (only {', '.join(tables)})")
        table = tables[found] if tables[found].features else tables[found]._resolve_features()
        image, label = columns(path, table.features)
        kind, count = table.features[label], (table.info.splits or {}).get(found)
        if isinstance(table.features[image], datasets.Image):
            table = table.cast_column(image, datasets.Image(decode=False))
        table = table.select_columns([image, label])
        shards = table.num_shards
    except (DataError, MemoryError):
        raise
    except Exception as error:
        raise DataError(f"{path}: cannot be opened by the package datasets ({' '.join(str(error).split())[:300]})") from None

    def segment(number: int) -> Callable[[], Iterator[Record]]:
        def read() -> Iterator[Record]:
            for row in table.shard(num_shards=shards, index=number):
                cell = row[image] or {}
                data = cell.get("bytes") or b""
                if not data and cell.get("path"):
                    # A data set from elsewhere may name files elsewhere, not any file of this machine.
                    if not (name.startswith("/") or _ELSEWHERE.match(cell["path"])):
                        raise DataError(f"{path}: names the file {cell['path']} instead of holding it; copy the data set to a disk")
                    with fsspec.open(cell["path"], "rb") as file:
                        data = file.read()
                named = cell.get("path") or f"image of SHA-256 {hashlib.sha256(data).hexdigest()[:16]}"
                yield Record(f"{path}/{found}: {os.path.basename(named)}", data, row[label] if row[label] is not None else -1)
        return read

    own = list(kind.names) if isinstance(kind, datasets.ClassLabel) else names
    return Stream(f"{path} ({found})", [segment(n) for n in range(shards)], count.num_examples if count else None, own)


# --------------------------------------------------------------------------------------------------
# WebDataset
# --------------------------------------------------------------------------------------------------

def _shards(path: str, names: list[str]) -> Stream:
    """``https://host/train-{000000..000099}.tar``, and s3://, gs:// and file:// likewise."""
    scheme = path.partition("://")[0].lower()
    if scheme not in _SCHEMES:
        raise ConfigError(f"{path}: streams begin with {', '.join(s + '://' for s in _SCHEMES)}; copy the data to a disk, and give that")
    if not path.split("?")[0].endswith(".tar"):
        raise ConfigError(f"{path}: the address of a stream names its shards, such as {scheme}://place/train-{{000000..000099}}.tar")
    if "$" in path or "::" in path or re.search(r"[\s'\"`;|&<>\\]", path.split("?")[0]):
        raise ConfigError(f"{path}: an address of shards holds no spaces, quotes, $ or shell signs; rename the shards")
    try:
        import webdataset
        from braceexpand import UnbalancedBracesError, braceexpand
    except ImportError:
        raise ConfigError(f"{path}: is a stream of WebDataset shards, which needs the package webdataset; pip install webdataset") from None
    try:
        urls = list(braceexpand(path))
    except UnbalancedBracesError:
        raise ConfigError(f"{path}: its braces do not match; shards are counted as in train-{{000000..000099}}.tar") from None

    def everything(urls: Iterable[Any]) -> Iterable[Any]:
        return urls  # who reads what is decided elsewhere

    def segment(url: str) -> Callable[[], Iterator[Record]]:
        # webdataset knows no s3; Amazon's own program does
        opened = f"pipe:aws s3 cp {shlex.quote(url)} -" if url.lower().startswith("s3://") else url

        def read() -> Iterator[Record]:
            for sample in webdataset.WebDataset([opened], shardshuffle=False, nodesplitter=everything, workersplitter=everything,
                                                empty_check=False, seed=0):  # without a seed it draws one from Python's generator
                suffix = next((s for s in _IMAGE_SUFFIXES if s in sample), None)
                if suffix is None:
                    continue
                name = f"{url}/{sample['__key__']}.{suffix}"
                label = next((found for s in ("cls", "json") if s in sample
                              and (found := label_of(sample[s], f".{s}")) is not None), None)
                if label is None:
                    raise DataError(f"{name}: has no label (.cls or .json) beside it")
                yield Record(name, sample[suffix], label)
        return read

    return Stream(path, [segment(url) for url in urls], None, names)
