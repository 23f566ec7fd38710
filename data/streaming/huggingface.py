"""Data sets of the Hugging Face hub as streams, through the package ``datasets``."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator

from config import ConfigError
from data.errors import DataError
from data.layouts.options import names_of
from data.sources.huggingface import find_columns, import_datasets
from data.streaming.stream import Record, Stream

_REMOTE = re.compile(r"(https?|hf|s3|gs)://|\w+://.*::(https?|hf|s3|gs)://")


def open_hub_stream(path: str, split: str, names: list[str]) -> Stream:
    """The stream of ``hf://owner/name``, ``hf://owner/name:config`` or ``hf:///a/folder/of/parquet/files``.

    Args:
        split: "train" or "val".
        names: class names, for a label column that has none.

    Raises:
        ConfigError: the package is missing.
        DataError: the data set cannot be opened, or lacks the split or the columns.
    """
    try:
        datasets = import_datasets()
        import fsspec  # comes with it
    except ImportError:
        raise ConfigError(f"{path}: is a Hugging Face stream, which needs the package datasets; pip install datasets") from None
    name, _, configuration = path[len("hf://"):].partition(":")
    try:
        tables = datasets.load_dataset(name, configuration or None, streaming=True)
        split_name = next((n for n in tables if n.lower() in names_of(split)), None)
        if split_name is None:
            raise DataError(f"{path}: has no {split} split (only {', '.join(tables)})")
        table = tables[split_name] if tables[split_name].features else tables[split_name]._resolve_features()
        image, label = find_columns(path, table.features)
        label_feature, info = table.features[label], (table.info.splits or {}).get(split_name)
        if isinstance(table.features[image], datasets.Image):
            table = table.cast_column(image, datasets.Image(decode=False))
        table = table.select_columns([image, label])
        shards = table.num_shards
    except (DataError, MemoryError):
        raise
    except Exception as error:
        raise DataError(f"{path}: cannot be opened by the package datasets ({' '.join(str(error).split())[:300]})") from None

    def segment(index: int) -> Callable[[], Iterator[Record]]:
        def read() -> Iterator[Record]:
            for row in table.shard(num_shards=shards, index=index):
                cell = row[image] or {}
                data = cell.get("bytes") or b""
                if not data and cell.get("path"):
                    # A remote data set may name remote files, but no file of this machine.
                    if not (name.startswith("/") or _REMOTE.match(cell["path"])):
                        raise DataError(f"{path}: names the file {cell['path']} instead of holding it; copy the data set to a disk")
                    with fsspec.open(cell["path"], "rb") as file:
                        data = file.read()
                file_name = cell.get("path") or f"image of SHA-256 {hashlib.sha256(data).hexdigest()[:16]}"
                yield Record(f"{path}/{split_name}: {os.path.basename(file_name)}", data, row[label] if row[label] is not None else -1)
        return read

    names = list(label_feature.names) if isinstance(label_feature, datasets.ClassLabel) else names
    return Stream(f"{path} ({split_name})", [segment(i) for i in range(shards)], info.num_examples if info else None, names)
