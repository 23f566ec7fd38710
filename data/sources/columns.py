"""Which column of a list is what: the image, the label, the split, the fold and the group, by their names and by what stands in them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from data.errors import DataError
from data.sources.packed_names import is_image

SPLIT_WORDS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "dev"), "test": ("test", "testing")}
IMAGE_COLUMNS = ("path", "filepath", "file_path", "file", "filename", "file_name", "fname", "image", "image_path", "image_file",
                 "image_name", "image_filename", "img", "img_path", "img_name", "imageid", "image_id", "img_id", "image_index", "photo",
                 "photo_id", "picture", "id_code", "id", "uid", "uuid", "name")
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "classname", "category", "target", "class_id", "label_id", "label_name",
                 "category_id", "category_name", "y", "predictionstring", "tags", "finding_labels", "attribute_ids")
_SUBJECTS = ("species", "breed", "diagnosis", "dx", "disease", "variety", "cultivar", "genus", "grade", "level")  # labels by what they tell
_SPLITS = ("split", "set", "subset", "partition", "phase", "fold")
_FLAGS = {"is_train": "train", "is_training": "train", "is_training_image": "train", "is_val": "val", "is_valid": "val",
          "is_validation": "val", "is_test": "test"}
_FOLDS = ("fold", "folds", "kfold", "k_fold", "fold_id", "fold_no", "cv_fold", "cv", "split", "partition")
_GROUPS = ("group", "group_id", "patient", "patient_id", "patientid", "subject", "subject_id", "lesion_id")
_NUMBERINGS = ("", "index", "idx", "no", "nr", "row", "unnamed_0")
_MOST_COLUMNS = 25_000  # as many labels as ImageNet-22K has, and more
# The cells of a column that says which images have a label: 1, 0, or -1 for one that is not known.
YES_OR_NO = {"": -1, "0": 0, "1": 1, "-1": -1, "0.0": 0, "1.0": 1, "-1.0": -1, "false": 0, "true": 1, "no": 0, "yes": 1}
_TRUE, _FALSE = ("1", "true", "yes", "t", "1.0"), ("0", "false", "no", "f", "0.0", "")


@dataclass(frozen=True)
class ListKeys:
    """What the config says of lists: names of columns, the folder of the images and their suffix; "" where it says nothing.

    Attributes:
        separator: what joins several labels of an image; ``blank``, ``none``, or ``auto``: the first of | ; and , that the labels hold.
        several: images have several labels; otherwise that is found out.
        unseen: the list is only judged: by its first rows, and without a look for the images.
    """

    image: str = ""
    label: str = ""
    split: str = ""
    group: str = ""
    root: str = ""
    suffix: str = ""
    separator: str = "auto"
    several: bool = False
    unseen: bool = False


NO_KEYS = ListKeys()


@dataclass(frozen=True)
class Columns:
    """Positions of the columns of a list; -1 where there is none.

    Attributes:
        flag: the split that a split column of true and false stands for; "" where its cells name the split.
        labels: the columns of 0 and 1, one a label, that stand in place of a label column.
    """

    image: int
    label: int
    split: int = -1
    fold: int = -1
    group: int = -1
    flag: str = ""
    labels: tuple[int, ...] = ()

    @property
    def highest(self) -> int:
        return max(self.image, self.label, self.split, self.fold, self.group, *self.labels)

    def split_of(self, cell: str) -> str:
        """The split that a cell of the split column names, in lower case."""
        word = cell.lower()
        if not self.flag:
            return word
        other = "val" if self.flag == "train" else "train"
        return self.flag if word in _TRUE else other if word in _FALSE else word


def _plain(word: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", word.lower()).strip("_")


def _nameless(word: str) -> str:
    """The name in ``IMAGE_COLUMNS``' spelling, camel case taken apart."""
    return _plain(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", word.strip()))


def known_header(cells: Sequence[str]) -> bool:
    """Whether a line names an image and a label column in usual words, and no image."""
    words = {_plain(cell) for cell in cells}
    return bool(words & set(IMAGE_COLUMNS) and words & {*LABEL_COLUMNS, *_SUBJECTS}) and not any(map(is_image, cells))


def find_columns(path: str, header: Sequence[str], rows: Sequence[Sequence[str]], keys: ListKeys) -> Columns:
    """The columns of a list, by the config's keys, their names, or what stands in the first rows, where that leaves no doubt.

    Args:
        path: the list and the line of its header, for messages.
        header: the names of the columns.
        rows: the first rows.

    Raises:
        DataError: a column that a key names is not there, or no column can be told to be that of the images or of the labels.
    """
    if len(header) > _MOST_COLUMNS:
        raise DataError(f"{path}: has {len(header):,} columns; a list of images has at most {_MOST_COLUMNS:,}")
    finder = _Finder(path, header, rows)
    split, flag, fold = finder.split_and_fold(keys.split)
    group = finder.named("DATA.GROUP_COLUMN", keys.group, _GROUPS)
    several = keys.label.split(",") if keys.label not in header and "," in keys.label else []
    labels = tuple(finder.asked("DATA.LABEL_COLUMN", name.strip()) for name in several)
    label_asked = finder.asked("DATA.LABEL_COLUMN", keys.label) if not labels else -1
    taken = {split, fold, group, label_asked, *labels}
    image = finder.asked("DATA.IMAGE_COLUMN", keys.image)
    image = finder.image(taken) if image < 0 else image
    labels = labels or (finder.of_labels({split, fold, group, image}) if label_asked < 0 else ())
    label = -1 if labels else finder.label({split, fold, image}) if label_asked < 0 else label_asked
    return Columns(image, label, split, fold, group if group not in (image, label, *labels) else -1, flag, labels)


class _Finder:
    def __init__(self, path: str, header: Sequence[str], rows: Sequence[Sequence[str]]):
        self.path, self.header, self.rows = path, [cell.strip() for cell in header], rows
        self.words = [_plain(cell) for cell in self.header]
        self.parts = [_nameless(cell) for cell in self.header]

    def cells(self, column: int) -> list[str]:
        return [row[column] for row in self.rows if column < len(row) and row[column]]

    def asked(self, key: str, name: str) -> int:
        """The column that a key names; -1 where the key is empty."""
        if not name:
            return -1
        for spelled, wanted in ((self.header, name), (self.words, _plain(name))):
            if wanted in spelled:
                return spelled.index(wanted)
        raise DataError(f"{self.path}: has no column {name!r}, which {key} names; its header is {self.shown()}")

    def named(self, key: str, name: str, names: Iterable[str]) -> int:
        """The column that a key names, or else the first of ``names`` that is there."""
        return column if (column := self.asked(key, name)) >= 0 else self.first(names, set())

    def first(self, names: Iterable[str], taken: set[int]) -> int:
        return next((i for name in names for i, words in enumerate(zip(self.words, self.parts, strict=True))
                     if name in words and i not in taken), -1)

    def split_and_fold(self, name: str) -> tuple[int, str, int]:
        """(split column, what its true means, fold column). A column of numbers is one of folds."""
        asked = self.asked("DATA.SPLIT_COLUMN", name)
        columns = [asked] if asked >= 0 else [i for word in _SPLITS for i in [self.first([word], set())] if i >= 0]
        known = {word for words in SPLIT_WORDS.values() for word in words}
        split = next((i for i in columns if not _numbers(self.cells(i)) and (
            asked >= 0 or self.words[i] == "split" or known & set(map(str.lower, self.cells(i))))), -1)
        flag = ""
        if split < 0:
            split = next((i for i in ([asked] if asked >= 0 else range(len(self.words)))
                          if self.parts[i] in _FLAGS and set(map(str.lower, self.cells(i))) <= {*_TRUE, *_FALSE}), -1)
            flag = _FLAGS[self.parts[split]] if split >= 0 else ""
        fold = asked if asked >= 0 and split < 0 else self.first(_FOLDS, {split})
        return split, flag, fold

    def image(self, taken: set[int]) -> int:
        free = [i for i in range(len(self.header)) if i not in taken]
        by_content = [i for i in free if self._mostly(i, lambda cell: is_image(os.path.basename(cell.replace("\\", "/"))))]
        for columns in (by_content, [i for i in free if i not in by_content]):
            if (known := self.first(IMAGE_COLUMNS, set(range(len(self.header))) - set(columns))) >= 0:
                return known
            if len(columns) == 1 and columns is by_content:
                return columns[0]
            named = [i for i in columns if re.search(r"(^|_)(image|img|file|path|photo|picture|id)(_|$)", self.parts[i])]
            if len(named) == 1:
                return named[0]
        rest = [i for i in free if i != self.first((*LABEL_COLUMNS, *_SUBJECTS), taken) and self.words[i] not in _NUMBERINGS]
        if len(rest) == 1 and len(self.header) > 1:
            return rest[0]
        raise self._unclear("images", "DATA.IMAGE_COLUMN", IMAGE_COLUMNS)

    def label(self, taken: set[int]) -> int:
        if (known := self.first(LABEL_COLUMNS, taken)) >= 0:
            return known
        subjects = self._subjects(taken)
        rest = [i for i in range(len(self.header)) if i not in taken and self.words[i] not in (*_NUMBERINGS, *_GROUPS)
                and not self._mostly(i, is_image)]
        for columns in (subjects, rest):
            if len(columns) == 1:
                return columns[0]
        raise self._unclear("labels", "DATA.LABEL_COLUMN", (*LABEL_COLUMNS, *_SUBJECTS))

    def of_labels(self, taken: set[int]) -> tuple[int, ...]:
        """The columns of 0 and 1 of a list that has at least two, and none that is called as labels are."""
        if self.first(LABEL_COLUMNS, taken) >= 0 or len(self._subjects(taken)) == 1:
            return ()
        found = [i for i in range(len(self.header)) if i not in taken and self.words[i] not in (*_NUMBERINGS, *_GROUPS)
                 and (cells := self.cells(i)) and {cell.lower() for cell in cells} <= YES_OR_NO.keys()]
        return tuple(found) if len(found) > 1 else ()

    def _subjects(self, taken: set[int]) -> list[int]:
        return [i for i, words in enumerate(zip(self.words, self.parts, strict=True)) if i not in taken and set(words) & set(_SUBJECTS)]

    def _mostly(self, column: int, test: Callable[[str], bool]) -> bool:
        cells = self.cells(column)
        return bool(cells) and sum(map(test, cells)) >= 0.9 * len(cells)

    def _unclear(self, what: str, key: str, names: Sequence[str]) -> DataError:
        return DataError(f"{self.path}: which column holds the {what} is not clear; its header is {self.shown()}. Name the column with "
                         f"{key}, or call it one of {', '.join(names)}")

    def shown(self) -> str:
        names = [repr(cell)[1:-1][:40] for cell in self.header]
        return "(" + ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") + ")"


def _numbers(cells: Sequence[str]) -> bool:
    return bool(cells) and all(re.fullmatch(r"-?\d+(\.0*)?", cell) for cell in cells)
