"""Parts of a data set: a validation share where there is no split, a share of the training images, some of the classes.

Which image is chosen follows from a hash of its name, so that adding images moves no other from one side to the other.
"""

from __future__ import annotations

import hashlib
import os

import numpy as np

from data.errors import DataError
from data.messages import Caution, Notice
from data.sources.base import Source, View
from data.sources.classes import some
from data.sources.lists import read_text


def split(source: Source, fraction: float, part: str) -> Source:
    """The training or the validation part of a source without a split: ``fraction`` of each class is for validation.

    The same images whatever the run's seed, so that runs can be compared. A class of two images or more has at least one on
    either side; one image goes to training.

    Args:
        part: "train" or "val".
    """
    counts = np.bincount(source.targets, minlength=len(source.classes))
    wanted = np.clip(np.round(fraction * counts), np.minimum(1, counts // 2), np.maximum(counts - 1, 0)).astype(np.int64)
    chosen = _chosen(source, wanted, "split")
    held = Notice(f"{source.root}: no split of its own; {int(chosen.sum())} of {len(source)} images are for validation (DATA.VAL_FRACTION)")
    mask = chosen if part == "val" else ~chosen
    return _part(source, mask, [*source.notices, held])


def subset(source: Source, share: float, seed: int) -> Source:
    """``share`` of each class's images, at least one, chosen by ``seed``."""
    counts = np.bincount(source.targets, minlength=len(source.classes))
    wanted = np.minimum(counts, np.maximum(1, np.round(share * counts))).astype(np.int64)
    mask = _chosen(source, wanted, f"subset {seed}")
    line = Notice(f"{source.root}: {int(mask.sum())} of {len(source)} training images are used (DATA.SUBSET {share:g})")
    return _part(source, mask, [*source.notices, line])


def _part(source: Source, mask: np.ndarray, notices: list[str]) -> Source:
    indices = np.flatnonzero(mask)
    return View(source, indices, source.classes, source.targets[indices], notices)


def _chosen(source: Source, wanted: np.ndarray, salt: str) -> np.ndarray:
    """A mask with ``wanted`` images of each class, those whose hashes are smallest."""
    common = os.path.join(source.root, "")
    hashes = np.empty(len(source), dtype=np.uint64)
    for i in range(len(source)):
        name = source.path(i).removeprefix(common)
        hashes[i] = int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8, key=salt.encode()).digest(), "little")
    order = np.lexsort((hashes, source.targets))
    starts = np.concatenate([[0], np.cumsum(np.bincount(source.targets, minlength=len(wanted)))])
    mask = np.zeros(len(source), dtype=bool)
    for number, count in enumerate(wanted.tolist()):
        mask[order[starts[number]:starts[number] + count]] = True
    return mask


def read_class_names(path: str) -> tuple[list[str], dict[str, str]]:
    """(classes in the classifier's order, class by label) of a file with a line a label: ``label`` or ``label<TAB>class``.

    Raises:
        DataError: unreadable, or a label stands twice.
    """
    table: dict[str, str] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        label, tab, name = line.partition("\t")
        label, name = label.strip(), (name if tab else label).strip()
        if not label or not name or label in table:
            raise DataError(f"{path}:{number}: {'stands twice' if label in table else 'is empty'} ({line.strip()[:80]!r})")
        table[label] = name
    if not table:
        raise DataError(f"{path}: names no classes")
    return list(dict.fromkeys(table.values())), table


def choose_classes(source: Source, path: str) -> Source:
    """``source`` with the classes that a file of class names gives; images of others are left out.

    Raises:
        DataError: the source has none of them.
    """
    classes, table = read_class_names(path)
    number = {name: i for i, name in enumerate(classes)}
    positions = np.array([number[table[name]] if name in table else -1 for name in source.classes], dtype=np.int64)
    targets = positions[source.targets]
    indices = np.flatnonzero(targets >= 0)
    if not len(indices):
        raise DataError(f"{path}: names none of the classes of {source.root} ({some(source.classes, 3)})")
    notices = list(source.notices)
    if left := len(source) - len(indices):
        notices.append(Notice(f"{source.root}: {left} images of classes that {path} does not name are left out"))
    if absent := [classes[i] for i in np.flatnonzero(np.bincount(targets[indices], minlength=len(classes)) == 0)]:
        notices.append(Caution(f"{source.root}: {len(absent)} classes of {path} have no images ({some(absent)})"))
    return View(source, indices, classes, targets[indices], notices)
