"""Parts of a data set: a split by fraction, a subset of the training images, a selection of classes.

Images are chosen by a hash of their names, so that adding images moves few others from one part to the other.
"""

from __future__ import annotations

import hashlib
import os

import numpy as np

from data.errors import DataError
from data.messages import Caution, Notice
from data.sources.base import Source, View
from data.sources.classes import first_few, join_by_number
from data.sources.label_sets import with_labels
from data.sources.lists import read_text


def split_by_fraction(source: Source, fraction: float, part: str) -> Source:
    """The training or the validation part of a source without a split: ``fraction`` of each class is for validation.

    The split does not depend on the run's seed, so that runs can be compared. A class of two images or more has at least one
    in each part; a single image is for training. Where images have several labels, each counts as one of its rarest.

    Args:
        part: "train" or "val".
    """
    counts = np.bincount(source.targets, minlength=len(source.classes))
    wanted = np.clip(np.round(fraction * counts), np.minimum(1, counts // 2), np.maximum(counts - 1, 0)).astype(np.int64)
    chosen = _choose(source, wanted, "split")
    return _part(source, chosen if part == "val" else ~chosen, Notice(
        f"{source.root}: no split of its own; {int(chosen.sum())} of {len(source)} images are for validation (DATA.VAL_FRACTION)"))


def subset(source: Source, fraction: float, seed: int) -> Source:
    """``fraction`` of each class's images, at least one, chosen by ``seed``."""
    counts = np.bincount(source.targets, minlength=len(source.classes))
    wanted = np.minimum(counts, np.maximum(1, np.round(fraction * counts))).astype(np.int64)
    chosen = _choose(source, wanted, f"subset {seed}")
    return _part(source, chosen, Notice(
        f"{source.root}: {int(chosen.sum())} of {len(source)} training images are used (DATA.SUBSET {fraction:g})"))


def _part(source: Source, mask: np.ndarray, notice: Notice) -> Source:
    indices = np.flatnonzero(mask)
    return View(source, indices, source.classes, source.targets[indices], [*source.notices, notice])


def _choose(source: Source, wanted: np.ndarray, salt: str) -> np.ndarray:
    """(images,) bool: ``wanted[c]`` images of each class c, those with the smallest hashes."""
    common = os.path.join(source.root, "")
    hashes = np.empty(len(source), dtype=np.uint64)
    for i in range(len(source)):
        name = source.path(i).removeprefix(common)
        hashes[i] = int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8, key=salt.encode()).digest(), "little")
    order = np.lexsort((hashes, source.targets))
    starts = np.concatenate([[0], np.cumsum(np.bincount(source.targets, minlength=len(wanted)))])
    mask = np.zeros(len(source), dtype=bool)
    for start, count in zip(starts, wanted.tolist(), strict=False):
        mask[order[start:start + count]] = True
    return mask


def read_class_names(path: str) -> tuple[list[str], dict[str, str]]:
    """(classes in the classifier's order, class of each label) from a file with one label per line: ``label`` or ``label<TAB>class``.

    Raises:
        DataError: unreadable, or a label is listed twice.
    """
    table: dict[str, str] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        label, tab, name = line.partition("\t")
        label, name = label.strip(), (name if tab else label).strip()
        if not label or not name or label in table:
            raise DataError(f"{path}:{number}: {'is listed twice' if label in table else 'is empty'} ({line.strip()[:80]!r})")
        table[label] = name
    if not table:
        raise DataError(f"{path}: names no classes")
    return list(dict.fromkeys(table.values())), table


def choose_classes(source: Source, path: str) -> Source:
    """``source`` with the classes that a file of class names lists; images of other classes are left out, and of an image's several labels
    the others.

    Raises:
        DataError: the source has none of these classes.
    """
    classes, table = read_class_names(path)
    position, labels = {name: i for i, name in enumerate(classes)}, list(table)
    positions = np.array([position[table[labels[at]]] if at >= 0 else -1 for at in join_by_number(source.classes, labels).tolist()],
                         dtype=np.int64)
    if source.labels is not None and (positions >= 0).any():
        return with_labels(source, classes, source.labels.mapped(positions, len(classes)))
    targets = np.append(positions, -1)[source.targets]
    indices = np.flatnonzero(targets >= 0)
    if not len(indices):
        raise DataError(f"{path}: names none of the classes of {source.root} ({first_few(source.classes, 3)})")
    notices = list(source.notices)
    if left := len(source) - len(indices):
        notices.append(Notice(f"{source.root}: {left} images of classes that {path} does not name are left out"))
    if absent := [classes[i] for i in np.flatnonzero(np.bincount(targets[indices], minlength=len(classes)) == 0)]:
        notices.append(Caution(f"{source.root}: {len(absent)} classes of {path} have no images ({first_few(absent)})"))
    return View(source, indices, classes, targets[indices], notices)
