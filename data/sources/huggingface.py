"""Hugging Face data sets on the local disk, through their own package ``datasets`` (optional)."""

from __future__ import annotations

import glob
import os
from typing import Any

import numpy as np

from data.errors import DataError, UnreadableImage
from data.sources.base import Source
from data.sources.classes import numbered, plain_number


class HubImages(Source):
    """Images of an Arrow table; the table is mapped into memory and shared by all processes."""

    def __init__(self, root: str, table: Any, image: str, classes: list[str], targets: np.ndarray):
        self.root, self.table, self.image, self.classes, self.targets, self.notices = root, table, image, classes, targets, []

    def path(self, index: int) -> str:
        return f"{self.root}[{index}]"

    def listing(self) -> bytes:
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
    found = [path for name in names for below in ("", "data") for pattern in (f"{name}-*.parquet", f"{name}.parquet", f"{name}/*.parquet")
             for path in glob.glob(os.path.join(glob.escape(os.path.join(root, below)), pattern))]
    return sorted(set(found))


def _package(root: str) -> Any:
    try:
        import datasets
        from datasets import disable_progress_bars  # a folder of that name in the working directory can be imported, too
    except ImportError:
        raise DataError(f"{root}: is a Hugging Face data set, which needs the package datasets; pip install datasets") from None
    disable_progress_bars()
    return datasets


def saved_splits(root: str) -> dict[str, Any]:
    """The tables of a saved data set by split; one without splits is under "".

    Raises:
        DataError: damaged, or the package is missing.
    """
    datasets = _package(root)
    try:
        found = datasets.load_from_disk(root)
    except Exception as error:  # pyarrow's and the package's own errors share no type
        raise DataError(f"{root}: is no readable Hugging Face data set ({' '.join(str(error).split())[:200]})") from None
    return dict(found) if isinstance(found, dict) else {"": found}


def parquet_table(root: str, files: list[str]) -> Any:
    """The table of parquet files; the package converts them to Arrow once, in its own cache."""
    datasets = _package(root)
    try:
        return datasets.load_dataset("parquet", data_files=files, split="train")
    except Exception as error:
        raise DataError(f"{files[0]}: is no readable parquet data set ({' '.join(str(error).split())[:200]})") from None


def columns(root: str, features: Any) -> tuple[str, str]:
    """The image column and the label column: named as usual, or the only ones of their kind.

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
    """The images of a table with an image column and a label column (both named as usual, or the only ones of their kind).

    Raises:
        DataError: there are no such columns.
    """
    import datasets
    features = table.features
    image, label = columns(root, features)
    values = table.select_columns([label])[:][label]
    if isinstance(features[label], datasets.ClassLabel):
        classes, targets = list(features[label].names), np.asarray(values, dtype=np.int64)
    else:
        words = [plain_number(str(value)) for value in values]
        classes = numbered(words)
        position = {name: i for i, name in enumerate(classes)}
        targets = np.array([position[word] for word in words], dtype=np.int64)
    if len(targets) and targets.min() < 0:
        raise DataError(f"{root}: its images have no labels (-1); choose another split")
    if isinstance(features[image], datasets.Image):
        table = table.cast_column(image, datasets.Image(decode=False))
    return HubImages(root, table.select_columns([image]), image, classes, targets)
