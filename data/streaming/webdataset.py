"""WebDataset shards as streams, through the package ``webdataset``."""

from __future__ import annotations

import re
import shlex
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from config import ConfigError
from data.errors import DataError
from data.sources.archives import label_of
from data.sources.classes import whole_number
from data.sources.tar import BEGINNING, CheckedHeader, damaged
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

    def segment(url: str) -> Callable[[], Iterator[Record]]:
        # webdataset cannot read s3; Amazon's own program can
        opened = f"pipe:aws s3 cp {shlex.quote(url)} -" if url.lower().startswith("s3://") else url

        def read() -> Iterator[Record]:
            for sample in webdataset.tariterators.group_by_keys(_members(webdataset.gopen(opened), url)):
                suffix = next((s for s in _IMAGE_SUFFIXES if s in sample), None)
                if suffix is None:
                    continue
                name = f"{url}/{sample['__key__']}.{suffix}"
                label = next((found for s in ("cls", "json") if s in sample
                              and (found := label_of(sample[s], f".{s}")) is not None), None)
                if label is None:
                    raise DataError(f"{name}: has no label (.cls or .json) in its sample")
                number = whole_number(label)  # a position among the classes, whatever these are called; 01 is a name first
                yield Record(name, sample[suffix], number if str(number) == label else label)
        return read

    return Stream(path, [segment(url) for url in urls], None, names)


def _members(stream: BinaryIO, url: str) -> Iterator[dict[str, Any]]:
    """The members of a shard as ``group_by_keys`` takes them, an empty one at its end.

    Raises:
        DataError: a damaged shard on a disk.
        OSError: a damaged shard elsewhere: it may be the connection that broke off.
    """
    name, end = BEGINNING, 0
    try:
        with tarfile.open(fileobj=stream, mode="r|*", tarinfo=CheckedHeader) as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # it would keep a kilobyte for each member
                if member.isreg():
                    yield dict(fname=member.name, data=tar.extractfile(member).read(), __url__=url)
                name, end = member.name, tar.offset
    except tarfile.TarError as error:
        fault = damaged(url, end, name, error)
        raise fault if url.startswith("file:") else OSError(str(fault)) from None
    yield {}
