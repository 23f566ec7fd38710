"""Class names: labels to classes, and a split's classes to those of the classifier, by name."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

import numpy as np

from data.errors import DataError
from data.messages import Caution, Notice
from data.sources.base import Source
from data.sources.packed_names import natural_key


def match_classes(source: Source, classes: Sequence[str] | None) -> Source:
    """``source`` with its targets as positions in ``classes``; None keeps its own classes.

    Labels that are all whole numbers, and none of them a class name, are taken for positions in ``classes``, as in Swin's and
    Caffe's lists of a flat validation folder.

    Raises:
        DataError: a class with images is missing from ``classes``.
    """
    if classes is None:
        if all(name.isdecimal() for name in source.classes) and source.classes != sorted(source.classes, key=natural_key) \
                and source.classes == sorted(source.classes):
            source.notices.append(Notice(f"{source.root}: numeric class folders are in alphabetical order, as in torchvision "
                                         f"({', '.join(source.classes[:3])}, ...); timm orders them by number; "
                                         "DATA.CLASS_NAMES sets an order"))
        return source
    names = list(classes)
    if names == source.classes:
        return source
    own, position = source.classes, {name: i for i, name in enumerate(names)}
    unknown = sorted(set(own) - set(names))
    if len(unknown) == len(own) and all(name.isdecimal() and int(name) < len(names) for name in own):
        source.notices.append(Notice(f"{source.root}: its labels are numbers; they are taken for positions among the {len(names)} classes"))
        table = np.array([int(name) for name in own], dtype=np.int64)
    elif unknown:
        raise DataError(f"{source.root}: class {unknown[0]!r} is unknown to the training classes"
                        f" ({len(unknown)} such: {first_few(unknown, 3)}); rename or remove the folder, or train with it")
    else:
        table = np.array([position[name] for name in own], dtype=np.int64)
    absent = [names[i] for i in sorted(set(range(len(names))) - set(table.tolist()))]
    if absent:
        source.notices.append(Caution(f"{source.root}: {len(absent)} classes without a folder ({first_few(absent)})", "missing-classes"))
    source.targets, source.classes = table[source.targets] if len(table) else source.targets, names
    return source


def encode_labels(labels: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """(class names, targets) of a list of labels; targets (labels,) int64 are positions in the names.

    Names are sorted as folders are, whole numbers by value. Numbers that begin at 0 and leave less than half of their range
    unused are taken for outputs of the classifier, so that an unused one stays a class without images.
    """
    distinct = set(labels)
    if not all(label.isascii() and label.isdecimal() for label in distinct):
        classes = sorted(distinct)
    else:
        numbers = sorted({int(label) for label in distinct})
        if numbers and numbers[0] == 0 and numbers[-1] < 2 * len(numbers):
            numbers = list(range(numbers[-1] + 1))
        classes = [str(number) for number in numbers]
    position = {name: i for i, name in enumerate(classes)}
    return classes, np.array([position[label] for label in labels], dtype=np.int64)


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


def strip_zeros(label: str) -> str:
    """``label``; a whole number without its leading zeros."""
    return str(int(label)) if label.isascii() and label.isdecimal() else label
