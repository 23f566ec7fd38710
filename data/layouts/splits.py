"""Parts of a data set: a split by fraction or fold, a subset of the training images, a selection of classes.

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
    in each part; a single image is for training. Images of a group (a patient's, say) stay together, where the source has groups.

    Args:
        part: "train" or "val".

    Raises:
        DataError: no class has more than one image.
    """
    if "group" in source.marks:
        held = _share_out_groups(source, [1 - fraction, fraction]) == 1
    else:
        counts = np.bincount(source.targets, minlength=len(source.classes))
        if counts.max(initial=0) < 2:
            few = first_few(source.classes, 3)
            raise DataError(f"{source.root}: no class has two images ({few}), so there is no image for validation; add "
                            "some, or name the column of the classes with DATA.LABEL_COLUMN")
        wanted = np.clip(np.round(fraction * counts), np.minimum(1, counts // 2), np.maximum(counts - 1, 0)).astype(np.int64)
        held = _choose(source, wanted, "split")
    return _part(source, held if part == "val" else ~held, Notice(
        f"{source.root}: no split of its own; {int(held.sum())} of {len(source)} images are for validation "
        f"(DATA.VAL_FRACTION){_whole(source)}"))


def split_by_fold(source: Source, fold: str, part: str) -> Source:
    """The training or the validation part of one fold of a cross-validation.

    The folds are those of the list's fold column; else ``k/n`` makes n of them, each with its share of every class, whatever the run's
    seed. Images of a group stay together, where the source has groups.

    Args:
        fold: ``k/n``, the k-th of n, or what the list's fold column calls it.
        part: "train" or "val"; the fold itself is "val".

    Raises:
        DataError: there is no such fold.
    """
    number, of, count = fold.partition("/")
    if "fold" in source.marks:
        names, folds = source.marks["fold"]
        if "" in names:
            raise DataError(f"{source.root}: {int((folds == names.index('')).sum())} images have an empty cell in the list's fold column; "
                            "fill them in")
        if of and int(count) != len(names):
            raise DataError(f"{source.root}: the list's fold column has {len(names)} folds ({first_few(names)}), DATA.FOLD {fold} is one "
                            f"of {count}; give one of 1/{len(names)} to {len(names)}/{len(names)}")
        chosen = int(number) - 1 if of else int(join_by_number([fold], names)[0])
        if chosen < 0:
            raise DataError(f"{source.root}: DATA.FOLD is {fold}, the list's folds are {first_few(names, 10)}; give one of them")
        words = f"fold {names[chosen]} of the list's column"
    else:
        if not of:
            raise DataError(f"{source.root}: has no fold column for DATA.FOLD {fold} to name a fold of; 1/5 makes the first of five")
        folds, chosen, words = make_folds(source, int(count)), int(number) - 1, f"fold {fold}{_whole(source)}"
    held = folds == chosen
    if not held.any() or held.all():
        raise DataError(f"{source.root}: DATA.FOLD {fold} leaves no images for {'training' if held.all() else 'validation'}; ask for fewer "
                        "folds")
    return _part(source, held if part == "val" else ~held, Notice(
        f"{source.root}: {words}, {int(held.sum())} of {len(source)} images, is for validation (DATA.FOLD)"))


def make_folds(source: Source, count: int) -> np.ndarray:
    """(images,) int64: one of ``count`` folds for each image; they differ by at most one image, in all and of every class. Rows of
    a list that name one image lie in one fold.

    Where the source has groups each lies in one fold, and the folds are as even as that allows.
    """
    if "group" in source.marks:
        return _share_out_groups(source, [1 / count] * count)
    hashes, folds = _hashes(source, "folds"), np.empty(len(source), dtype=np.int64)
    _, first, image = np.unique(hashes, return_index=True, return_inverse=True)  # an image may have several rows in a list
    targets = source.targets[first][image]
    order = np.lexsort((hashes, targets))
    folds[order] = np.cumsum(np.diff(hashes[order], prepend=hashes[order[:1]]) != 0) % count
    return folds


def _whole(source: Source) -> str:
    return f", each of the {len(source.marks['group'][0]):,} groups in one part" if "group" in source.marks else ""


def _share_out_groups(source: Source, shares: list[float]) -> np.ndarray:
    """(images,) int64: the part of each image, whole groups at a time, so that each part has about its share of all and of every class.

    Greedy, the largest group first: it goes where it brings the numbers of its classes, and of all images, closest to what they should be.
    """
    names, groups = source.marks["group"]
    alone = groups == names.index("") if "" in names else np.zeros(len(groups), dtype=bool)  # an empty cell is a group of its own
    groups = np.where(alone, len(names) + np.arange(len(groups)), groups)
    _, groups = np.unique(groups, return_inverse=True)
    kinds = int(source.targets.max(initial=len(source.classes) - 1)) + 2  # the last column counts all images
    order = np.argsort(groups, kind="stable")
    bounds = np.flatnonzero(np.diff(groups[order], prepend=-1, append=groups.max() + 1))
    totals = np.append(np.bincount(source.targets, minlength=kinds - 1), len(groups)).astype(np.float64)
    missing = np.outer(shares, totals)  # (parts, classes + 1): images still to come
    weights = 1 / np.maximum(totals, 1)
    sizes = np.diff(bounds)
    parts = np.empty(len(groups), dtype=np.int64)
    for group in np.argsort(-sizes, kind="stable").tolist():
        members = order[bounds[group]:bounds[group + 1]]
        classes, counts = np.unique(source.targets[members], return_counts=True)
        classes, counts = np.append(classes, kinds - 1), np.append(counts, len(members))
        worse = (weights[classes] * counts * (counts - 2 * missing[:, classes])).sum(axis=1)  # the change of the squared distance
        part = int(worse.argmin())
        missing[part, classes] -= counts
        parts[members] = part
    return parts


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
    """(images,) bool: ``wanted[c]`` images of each class c, those with the smallest hashes, and all other rows of these."""
    hashes = _hashes(source, salt)
    order = np.lexsort((hashes, source.targets))
    starts = np.concatenate([[0], np.cumsum(np.bincount(source.targets, minlength=len(wanted)))])
    mask = np.zeros(len(source), dtype=bool)
    for start, count in zip(starts, wanted.tolist(), strict=False):
        mask[order[start:start + count]] = True
    return np.isin(hashes, hashes[mask])  # all rows of an image that a list names again


def _hashes(source: Source, salt: str) -> np.ndarray:
    """(images,) uint64: of their names below the source's root."""
    common = os.path.join(source.root, "")
    hashes = np.empty(len(source), dtype=np.uint64)
    for i in range(len(source)):
        name = source.path(i).removeprefix(common)
        hashes[i] = int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8, key=salt.encode()).digest(), "little")
    return hashes


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
