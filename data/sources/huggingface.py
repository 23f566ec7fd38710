"""Hugging Face data sets on the local disk, through the optional package ``datasets``."""

from __future__ import annotations

import glob
import os
from typing import Any

import numpy as np

from data.errors import DataError, UnreadableImage
from data.sources.base import Source
from data.sources.classes import encode_labels


class HubImages(Source):
    """Images of an Arrow table, which is mapped into memory and shared by all processes."""

    def __init__(self, root: str, table: Any, image: str, classes: list[str], targets: np.ndarray):
        self.root, self.table, self.image, self.classes, self.targets, self.notices = root, table, image, classes, targets, []

    def path(self, index: int) -> str:
        return f"{self.root}[{index}]"

    def identity(self) -> bytes:
        return str(len(self.table)).encode()

    def fetch(self, index: int) -> bytes:
        cell = self.table[index][self.image]
        if cell and cell.get("bytes"):
            return cell["bytes"]
        if not cell or not cell.get("path"):
            raise UnreadableImage.of(self.path(index), "an empty cell")
        with open(cell["path"], "rb") as file:
            return file.read()


def is_saved(root: str) -> bool:
    """Whether ``root`` was written by ``save_to_disk``."""
    return os.path.exists(os.path.join(root, "dataset_dict.json")) or os.path.exists(os.path.join(root, "state.json"))


def parquet_files(root: str, names: tuple[str, ...]) -> list[str]:
    """The parquet files of a split as the hub lays them out: ``data/train-00000-of-00010.parquet``, or ``train/*.parquet``."""
    paths = {path for name in names for below in ("", "data") for pattern in (f"{name}-*.parquet", f"{name}.parquet", f"{name}/*.parquet")
             for path in glob.glob(os.path.join(glob.escape(os.path.join(root, below)), pattern))}
    return sorted(paths)


def import_datasets() -> Any:
    """The package ``datasets``, its progress bars off.

    Raises:
        ImportError: it is not installed.
    """
    import datasets
    from datasets import disable_progress_bars  # a folder called datasets in the working directory can be imported, but has no such name
    disable_progress_bars()
    return datasets


def _require_datasets(root: str) -> Any:
    try:
        return import_datasets()
    except ImportError:
        raise DataError(f"{root}: is a Hugging Face data set, which needs the package datasets; pip install datasets") from None


def saved_splits(root: str) -> dict[str, Any]:
    """The tables of a saved data set by split; the key of one without splits is "".

    Raises:
        DataError: damaged, or the package is missing.
    """
    datasets = _require_datasets(root)
    try:
        tables = datasets.load_from_disk(root)
    except Exception as error:  # pyarrow's and the package's own errors share no type
        raise DataError(f"{root}: is not a readable Hugging Face data set ({' '.join(str(error).split())[:200]})") from None
    return dict(tables) if isinstance(tables, dict) else {"": tables}


def parquet_table(root: str, files: list[str]) -> Any:
    """The table of parquet files; the package converts them to Arrow once, in its own cache.

    Raises:
        DataError: damaged, or the package is missing.
    """
    datasets = _require_datasets(root)
    try:
        return datasets.load_dataset("parquet", data_files=files, split="train")
    except Exception as error:
        raise DataError(f"{files[0]}: is not a readable parquet data set ({' '.join(str(error).split())[:200]})") from None


def find_columns(root: str, features: Any) -> tuple[str, str]:
    """The names of the image column and of the label column: the usual names, or the first of their type.

    Raises:
        DataError: there are no such columns.
    """
    import datasets
    images = [n for n, f in features.items() if isinstance(f, datasets.Image)]
    images = images or [n for n, f in features.items() if isinstance(f, dict) and set(f) == {"bytes", "path"}]
    labels = [n for n, f in features.items() if isinstance(f, datasets.ClassLabel)]
    labels = labels or [n for n in ("label", "labels", "fine_label", "class", "target", "category") if n in features]
    if not images or not labels:
        raise DataError(f"{root}: needs an image column and a label column; it has {', '.join(features)}")
    image = "image" if "image" in images else images[0]
    label = "label" if "label" in labels else labels[0]
    return image, label


def hub_source(root: str, table: Any) -> HubImages:
    """The images of a table that has an image column and a label column.

    Raises:
        DataError: there are no such columns, or no labels.
    """
    import datasets
    features = table.features
    image, label = find_columns(root, features)
    values = table.select_columns([label])[:][label]
    if isinstance(features[label], datasets.ClassLabel):
        classes, targets = list(features[label].names), np.asarray(values, dtype=np.int64)
    else:
        classes, targets = encode_labels([str(value) for value in values])
    if len(targets) and targets.min() < 0:
        raise DataError(f"{root}: its images have no labels (-1); choose another split")
    if isinstance(features[image], datasets.Image):
        table = table.cast_column(image, datasets.Image(decode=False))
    return HubImages(root, table.select_columns([image]), image, classes, targets)
