"""Class names: labels to classes, and a split's classes to those of the classifier, by name."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from importlib import resources

import numpy as np

from data.errors import DataError
from data.messages import Caution, Notice
from data.sources.base import Source
from data.sources.packed_names import natural_key

_MOST_DIGITS = 18  # what an int64 holds


def match_classes(source: Source, classes: Sequence[str] | None) -> Source:
    """``source`` with its targets as positions in ``classes``, joined by name; None keeps its own classes.

    Whole numbers join names that are the same number (01, 1 and 1.0), where this brings every label home. Labels that are
    all whole numbers, and none of them a class name, are taken for positions in ``classes``, as in Swin's and Caffe's lists of a flat
    validation folder.

    Raises:
        DataError: a class with images is missing from ``classes``.
    """
    if classes is None:
        if all(name.isdecimal() for name in source.classes) and source.classes != sorted(source.classes, key=natural_key) \
                and source.classes == sorted(source.classes):
            source.notices.append(Notice(f"{source.root}: numeric class folders are in alphabetical order, as in torchvision "
                                         f"({', '.join(source.classes[:3])}, ...); timm orders them by number; "
                                         "DATA.CLASS_NAMES sets an order"))
        if alike := _differing_little(source.classes):
            source.notices.append(Caution(f"{source.root}: {' and '.join(alike)} are different classes; if they are one, write them alike"))
        return source
    names = list(classes)
    if names == source.classes:
        return source
    used = np.unique(source.targets) if source.labels is None else np.flatnonzero(source.labels.counts())
    own = [source.classes[i] for i in used]
    found, how = join_names(own, names)
    if unknown := sorted(name for name, at in zip(own, found.tolist(), strict=True) if at < 0):
        raise DataError(f"{source.root}: class {unknown[0]!r} is unknown to the training classes"
                        f" ({len(unknown)} such: {first_few(unknown, 3)}); rename or remove the folder, or train with it")
    if how:
        source.notices.append(Notice(f"{source.root}: {how}"))
    absent = [names[i] for i in sorted(set(range(len(names))) - set(found.tolist()))]
    if absent:
        source.notices.append(Caution(f"{source.root}: {len(absent)} classes without a folder ({first_few(absent)})", "missing-classes"))
    if source.labels is not None:
        table = join_by_number(source.classes, names)
        table[used] = found
        source.labels = source.labels.mapped(table, len(names))
        source.targets, source.classes = source.labels.rarest(), names
        return source
    table = np.full(len(source.classes), -1, dtype=np.int64)
    table[used] = found
    source.targets, source.classes = table[source.targets], names
    return source


def join_names(own: Sequence[str], names: Sequence[str]) -> tuple[np.ndarray, str]:
    """(positions in ``names`` of the labels ``own`` (labels,) int64, -1 for an unknown one; how they were joined, "" by name).

    Names that are equal come first, then equal numbers, and positions only where not a single label is a name.
    """
    exact, by_number = class_positions(own, names), join_by_number(own, names)
    if (exact >= 0).all():
        return exact, ""
    if (by_number >= 0).all():
        at = int(np.flatnonzero(exact < 0)[0])
        return by_number, ("its labels and the classes are the same numbers, written differently; they are joined as numbers "
                           f"({own[at]} is {names[by_number[at]]})")
    numbers = [whole_number(name) for name in own]
    if (exact < 0).all() and all(number is not None and number < len(names) for number in numbers):
        return np.array(numbers, dtype=np.int64), (f"its labels are numbers; they are taken for positions among the {len(names)} classes "
                                                   f"({own[0]} is {names[numbers[0]]})")
    return exact, ""


def join_by_number(own: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Positions in ``names`` of the labels ``own`` (labels,) int64: of the equal name, else of the equal number, else -1."""
    places: dict[int | None, int] = {}
    for i, name in enumerate(names):
        number = whole_number(name)
        places[number] = -1 if number is None or number in places else i  # 1 and 01 as two classes: neither is meant by 001
    found = class_positions(own, names)
    return np.array([at if at >= 0 else places.get(whole_number(name), -1) for at, name in zip(found.tolist(), own, strict=True)],
                    dtype=np.int64)


def class_positions(own: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Positions in ``names`` of the labels ``own`` (labels,) int64, -1 for those that are not there."""
    position = {name: i for i, name in enumerate(names)}
    return np.array([position.get(name, -1) for name in own], dtype=np.int64)


def encode_labels(labels: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """(class names, targets) of a list of labels; targets (labels,) int64 are positions in the names.

    Names are the labels as they are spelled, sorted as folders are, whole numbers by value. Numbers that begin at 0 and leave less than
    half of their range unused are taken for outputs of the classifier, so that an unused one stays a class without images.
    """
    numbers = {label: whole_number(label) for label in set(labels)}
    if None in numbers.values():
        classes = sorted(numbers)
    else:
        classes = sorted(numbers, key=lambda label: (numbers[label], label))
        # 00, 01, 03: the unused one is spelled as the others are
        outputs = [str(number).zfill(len(classes[0])) for number in range(2 * len(classes))] if classes else []
        if classes and set(classes) <= set(outputs) and classes[0] == outputs[0]:
            classes = outputs[:numbers[classes[-1]] + 1]
    return classes, class_positions(labels, classes)


def imagenet_classes() -> list[str]:
    """The WordNet ids of ImageNet's 1,000 classes in the order of every published classifier, from timm's list."""
    from timm.data import ImageNetInfo
    return list(ImageNetInfo("imagenet-1k").label_names())


def timm_label_file(name: str) -> str | None:
    """The text of a label file that timm ships, such as ``imagenet_a_synsets.txt``; None where it ships none of that name."""
    try:
        return (resources.files("timm.data") / "_info" / name).read_text(encoding="utf-8")
    except (OSError, ModuleNotFoundError):
        return None


def first_few(names: Sequence[str], count: int = 5) -> str:
    """The first ``count`` of ``names`` for a message, with dots where there are more."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def whole_number(label: str) -> int | None:
    """The number that a label is, with leading zeros or as a table of floats has it (1.0); None for other labels, and for more digits than
    any number of classes has."""
    digits = label.removesuffix(".0")
    return int(digits) if len(digits) <= _MOST_DIGITS and digits.isascii() and digits.isdecimal() else None


def _differing_little(names: Sequence[str]) -> list[str]:
    """The first names that are the same number, or the same text but for capitals, blanks and the coding of accents; [] where there are
    none."""
    spelled: dict[int | str, list[str]] = {}
    for name in names:
        value, text = whole_number(name), " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        spelled.setdefault(text if value is None else value, []).append(name)
    return next((same for same in spelled.values() if len(same) > 1), [])
