"""What is looked for: the settings that matter for finding images, and the names of splits."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from yacs.config import CfgNode

from data.layouts.splits import split_by_fold, split_by_fraction
from data.sources.base import Source
from data.sources.columns import NO_KEYS, ListKeys
from data.sources.folder import VAL_NAMES, visible_entries
from data.sources.index_cache import cache_folder

SPLIT_NAMES = {"train": ("train", "training"), "val": (*VAL_NAMES, "valid"), "test": ("test", "testing")}
ALL = "all"  # the value of TEST.SPLIT that stands for everything there is


def names_of(split: str) -> tuple[str, ...]:
    """The names that a split's folder or file may have, in lower case."""
    return SPLIT_NAMES.get(split, (split.lower(),))


def _canonical(split: str) -> str:
    """validation is val, testing is test."""
    return next((name for name, names in SPLIT_NAMES.items() if split.lower() in names), split.lower())


def split_folders_among(names: Sequence[str]) -> list[str]:
    """Those of ``names`` that are folders of a split, however they are capitalised."""
    known = {name for spelled in SPLIT_NAMES.values() for name in spelled}
    return [name for name in names if name.lower() in known]


def find_entry(folder: str, names: Sequence[str], test: Callable[[str], bool]) -> str | None:
    """The path of the first of ``names`` in ``folder`` that passes ``test``, spelled so, or else in other capitals (Train/)."""
    for name in names:
        if test(path := os.path.join(folder, name)):
            return path
    there = {entry.name.lower(): entry.path for entry in visible_entries(folder)}
    return next((there[name.lower()] for name in names if name.lower() in there and test(there[name.lower()])), None)


def resolve_data_file(path: str, root: str) -> str:
    """The path of a file or folder that a config key names: as given, or, where that is not there, in the data's folder ``root``, so
    that a checkpoint finds it from any working directory."""
    path, root = os.path.expanduser(path), os.path.expanduser(root)
    inside = os.path.join(root if os.path.isdir(root) else os.path.dirname(root), path)
    return inside if path and not os.path.exists(path) and os.path.exists(inside) else path


@dataclass(frozen=True)
class Options:
    """The settings that matter for finding images.

    Attributes:
        cache: the folder of the index cache.
        keys: what lists are like.
        alone: nothing but an evaluation is asked for: data without splits are evaluated whole.
        judged: the split that it evaluates.
    """

    dataset: str = "imagenet"
    zip_mode: bool = False
    val_fraction: float = 0.0
    val_labels: str = ""
    cache: str | None = None
    fold: str = ""
    keys: ListKeys = NO_KEYS
    alone: bool = False
    judged: str = "val"

    @classmethod
    def of(cls, config: CfgNode, alone: bool = False) -> Options:
        data = config.DATA
        keys = ListKeys(data.IMAGE_COLUMN, data.LABEL_COLUMN, data.SPLIT_COLUMN, data.GROUP_COLUMN,
                        resolve_data_file(data.IMAGE_ROOT, data.DATA_PATH), data.IMAGE_SUFFIX, data.LABEL_SEPARATOR,
                        config.TASK == "multilabel")
        return cls(data.DATASET, data.ZIP_MODE, data.VAL_FRACTION, resolve_data_file(data.VAL_LABELS, data.DATA_PATH),
                   cache_folder(data.INDEX_CACHE), data.FOLD, keys, alone, _canonical(config.TEST.SPLIT) if alone else "val")

    def labels(self, split: str) -> str:
        """The label file for a flat folder or archive, where a key names one."""
        return self.val_labels if split == self.judged else ""

    def allows(self, kind: str) -> bool:
        """Whether layouts of this kind are looked for: folder, lists, zip, tar or huggingface."""
        if self.dataset == "imagenet22K":
            return kind in ("lists", "folder")
        return self.dataset in ("imagenet", "digits", kind) and (not self.zip_mode or kind == "zip")

    def divides(self, split: str) -> bool:
        """Whether this split is a part of what has none: by DATA.FOLD or DATA.VAL_FRACTION."""
        return bool(self.fold or self.val_fraction) and split in ("train", "val")

    def whole(self, split: str) -> bool:
        """Whether everything there is is this split, where the data have none."""
        return self.alone and split in ("val", ALL) and not self.divides(split)

    def part(self, source: Source, split: str) -> Source:
        """The part of ``source`` that is this split."""
        return split_by_fold(source, self.fold, split) if self.fold else split_by_fraction(source, self.val_fraction, split)
