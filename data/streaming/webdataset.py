"""WebDataset shards as streams, through the package ``webdataset``."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from config import ConfigError
from data.errors import DataError
from data.sources.archives import label_of
from data.streaming.stream import Record, Stream

_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
_SCHEMES = ("https", "http", "s3", "gs", "file", "hf")


def open_shard_stream(path: str, names: list[str]) -> Stream:
    """The stream of ``https://host/train-{000000..000099}.tar``; s3://, gs:// and file:// likewise.

    Args:
        names: class names.

    Raises:
        ConfigError: not such an address, or the package is missing.
    """
    scheme = path.partition("://")[0].lower()
    if scheme not in _SCHEMES:
        raise ConfigError(f"{path}: streams begin with {', '.join(s + '://' for s in _SCHEMES)}; copy the data to a disk, and give that")
    if not path.split("?")[0].endswith(".tar"):
        raise ConfigError(f"{path}: the address of a stream names its shards, such as {scheme}://place/train-{{000000..000099}}.tar")
    if "$" in path or "::" in path or re.search(r"[\s'\"`;|&<>\\]", path.split("?")[0]):
        raise ConfigError(f"{path}: the address of shards must have no spaces, quotes, $ or shell characters; rename the shards")
    try:
        import webdataset
        from braceexpand import UnbalancedBracesError, braceexpand
    except ImportError:
        raise ConfigError(f"{path}: is a stream of WebDataset shards, which needs the package webdataset; pip install webdataset") from None
    try:
        urls = list(braceexpand(path))
    except UnbalancedBracesError:
        raise ConfigError(f"{path}: its braces do not match; write the shards' numbers as in train-{{000000..000099}}.tar") from None

    def no_split(urls: Iterable[Any]) -> Iterable[Any]:
        return urls  # ``StreamSampler`` shares the images out between processes

    def segment(url: str) -> Callable[[], Iterator[Record]]:
        # webdataset cannot read s3; Amazon's own program can
        opened = f"pipe:aws s3 cp {shlex.quote(url)} -" if url.lower().startswith("s3://") else url

        def read() -> Iterator[Record]:
            for sample in webdataset.WebDataset([opened], shardshuffle=False, nodesplitter=no_split, workersplitter=no_split,
                                                empty_check=False, seed=0):  # without a seed it draws one from Python's generator
                suffix = next((s for s in _IMAGE_SUFFIXES if s in sample), None)
                if suffix is None:
                    continue
                name = f"{url}/{sample['__key__']}.{suffix}"
                label = next((found for s in ("cls", "json") if s in sample
                              and (found := label_of(sample[s], f".{s}")) is not None), None)
                if label is None:
                    raise DataError(f"{name}: has no label (.cls or .json) in its sample")
                yield Record(name, sample[suffix], label)
        return read

    return Stream(path, [segment(url) for url in urls], None, names)
