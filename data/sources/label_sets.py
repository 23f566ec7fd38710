"""Several labels an image: joined in a cell of a list (``red|green``), or a column of 0 and 1 a label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from data.errors import DataError
from data.messages import Caution, Notice
from data.sources.base import Source
from data.sources.classes import encode_labels, first_few
from data.sources.columns import ListKeys

_SEPARATORS = ("|", ";", ",")  # that are found by themselves, in this order


class MultiHot(str):
    """A row's columns of 0 and 1 as one label; the text tells rows of different values apart.

    Attributes:
        names: the columns.
        values: of each column: 1, 0, or -1 where it is not known.
        left_out: further columns of the list.
    """

    names: Sequence[str]
    values: tuple[int, ...]
    left_out: Sequence[str]

    def __new__(cls, names: Sequence[str], values: tuple[int, ...], left_out: Sequence[str] = ()) -> MultiHot:
        made = super().__new__(cls, " ".join(f"{name}={value}" for name, value in zip(names, values, strict=True)))
        made.names, made.values, made.left_out = names, values, left_out
        return made


@dataclass(frozen=True)
class LabelSets:
    """Which labels each image has.

    Attributes:
        table: (sets, labels) int8, a row for each set of labels that occurs: 1 it has the label, 0 it has not, -1 it is not known.
        which: (images,) int64: the row of each image.
        separator: what joins them in the list; "" where they are columns.
    """

    table: np.ndarray
    which: np.ndarray
    separator: str = ""

    def __getitem__(self, index: int) -> np.ndarray:
        """(labels,) int8, of one image."""
        return self.table[self.which[index]]

    def take(self, indices: np.ndarray) -> LabelSets:
        """Of some images."""
        return replace(self, which=self.which[indices])

    def mapped(self, positions: Sequence[int] | np.ndarray, number: int) -> LabelSets:
        """With ``number`` labels, the old ones at ``positions`` among them, -1 dropping one; several may become one."""
        table = np.zeros((len(self.table), number), dtype=np.int8)
        for old, new in zip(self.table.T, positions, strict=True):
            if new >= 0:
                there = table[:, new]
                table[:, new] = np.where((there == 1) | (np.abs(there) > np.abs(old)), there, old)
        return replace(self, table=table)

    def counts(self, images: np.ndarray | slice = slice(None)) -> np.ndarray:
        """(labels,) int64: how many of the ``images`` have each label."""
        times = np.bincount(self.which[images], minlength=len(self.table))
        return np.array([times[column == 1].sum() for column in self.table.T], dtype=np.int64)

    def rarest(self) -> np.ndarray:
        """(images,) int64: of its labels the one that the fewest images have, or the number of labels where it has none."""
        found = np.full(len(self.table), self.table.shape[1], dtype=np.int64)
        for label in np.argsort(-self.counts(), kind="stable").tolist():
            found[self.table[:, label] == 1] = label
        return found[self.which]


# --------------------------------------------------------------------------------------------------
# From what a list says
# --------------------------------------------------------------------------------------------------

def find_label_sets(source: Source, keys: ListKeys) -> Source:
    """``source``, whose classes are the different texts of a list, with labels in place of these where images have several.

    Unless they are wanted, or their separator is named, joined labels are found where that is unambiguous: most texts with the separator
    share a label with another text, and, since commas stand in names too, commas make no more labels than there are texts.

    Raises:
        DataError: two columns of the same name, or labels that seem to be joined by blanks.
    """
    texts = source.classes
    if texts and isinstance(texts[0], MultiHot):
        return _of_columns(source, texts[0], keys)
    found = _splitter(source, keys)
    several = next((text for text in texts if len(text.split()) > 1), None)
    if found is None and keys.separator == "auto" and several and _is_unambiguous(list(map(str.split, texts)), ","):
        if keys.several:
            raise DataError(f"{source.root}: {several!r} is one label, unless blanks join several; say which with --opts "
                            "DATA.LABEL_SEPARATOR none, or blank")
        source.notices.append(Notice(f"{source.root}: {several!r} is taken for the name of one class; where blanks join several labels: "
                                     "--opts TASK multilabel DATA.LABEL_SEPARATOR blank"))
    if found is None and not keys.several:
        return source
    split, mark = found or ((lambda text: [text] if text else []), "")
    parts = [split(text) for text in texts]
    classes, places = encode_labels([part for some in parts for part in some])
    table = np.zeros((len(texts), len(classes)), dtype=np.int8)
    table[np.repeat(np.arange(len(texts)), [len(some) for some in parts]), places] = 1
    return with_labels(source, classes, LabelSets(table, source.targets, mark))


def with_labels(source: Source, classes: list[str], labels: LabelSets) -> Source:
    """``source`` with several labels an image; its targets, by which images are grouped, are the rarest ones."""
    source.classes, source.labels, source.targets = classes, labels, labels.rarest()
    return source


def one_label_each(source: Source) -> Source:
    """``source`` as one of several labels an image, where its images have one class each."""
    if source.labels is None:
        source = with_labels(source, source.classes, LabelSets(np.eye(len(source.classes), dtype=np.int8), source.targets))
    return source


def tell_single_labels(source: Source) -> None:
    """A word where no image has more than one label."""
    if (source.labels.table[np.unique(source.labels.which)] == 1).sum(axis=1).max(initial=0) <= 1:
        source.notices.append(Caution(f"{source.root}: no image has more than one label ({first_few(source.classes, 3)}); where labels are "
                                      "joined by something else than | ; or , name it with DATA.LABEL_SEPARATOR"))


def _splitter(source: Source, keys: ListKeys) -> tuple[Callable[[str], list[str]], str] | None:
    """(what splits the source's texts into labels, the separator); None where they are names of classes."""
    for mark in {"auto": _SEPARATORS, "none": ()}.get(keys.separator, (keys.separator,)):
        def split(text: str, mark: str | None = None if mark == "blank" else mark) -> list[str]:
            return list(dict.fromkeys(part for part in map(str.strip, text.split(mark)) if part))

        several = next((text for text in source.classes if len(split(text)) > 1), None)
        if several is None and keys.separator == "auto":
            continue
        if keys.several or keys.separator != "auto" or _is_unambiguous(list(map(split, source.classes)), mark):
            source.notices.append(Notice(f"{source.root}: several labels an image (TASK multilabel), joined by {mark!r}; with "
                                         "DATA.LABEL_SEPARATOR none they are names of classes"))
            return split, mark
        source.notices.append(Notice(f"{source.root}: {several!r} is taken for the name of one class; where it is several labels: --opts "
                                     "TASK multilabel"))
        return None
    return None


def _is_unambiguous(sets: Sequence[Sequence[str]], mark: str) -> bool:
    """Whether the texts that were split into ``sets`` at ``mark`` are several labels, and not names."""
    occurs = Counter(part for some in sets for part in some)
    several = [some for some in sets if len(some) > 1]
    shared = sum(any(occurs[part] > 1 for part in some) for some in several)
    return 2 * shared >= len(several) and (mark != "," or len(occurs) <= len(sets))


def _of_columns(source: Source, first: MultiHot, keys: ListKeys) -> Source:
    """From texts that are all ``MultiHot`` of the same columns."""
    if double := next((name for name, times in Counter(first.names).items() if times > 1), None):
        raise DataError(f"{source.root}: two columns are called {double!r}; rename one")
    classes, places = encode_labels(first.names)
    labels = LabelSets(np.array([text.values for text in source.classes], dtype=np.int8), source.targets).mapped(places, len(classes))
    one = not keys.several and bool(((labels.table == 1).sum(axis=1) == 1).all() and (labels.table >= 0).all())
    notices = [Notice(f"{source.root}: {len(classes)} columns of 0 and 1 ({first_few(classes)}) are "
                      + ("classes, one an image" if one else "labels, several an image")
                      + (f"; other columns are left out ({first_few(first.left_out)})" if first.left_out else ""))]
    if unknown := int((labels.table[labels.which] < 0).sum()):
        notices.append(Notice(f"{source.root}: {unknown} empty or negative cells say that a label is not known; they do not count"))
    source.notices += notices
    if one:
        source.classes, source.targets = classes, labels.table.argmax(axis=1)[labels.which].astype(np.int64)
        return source
    return with_labels(source, classes, labels)

