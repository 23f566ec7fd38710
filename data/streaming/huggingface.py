"""A data set of the Hugging Face hub as a stream."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator

from config import ConfigError
from data.errors import DataError
from data.layouts.detect import SPLIT_NAMES
from data.streaming.stream import Record, Stream

_ELSEWHERE = re.compile(r"(https?|hf|s3|gs)://|\w+://.*::(https?|hf|s3|gs)://")


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
    from data.sources.huggingface import columns
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
