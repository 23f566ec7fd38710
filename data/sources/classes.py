"""Classes are names: what a split found is joined by name to what the classifier knows."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

import numpy as np

from data.errors import DataError
from data.messages import Caution, Notice
from data.sources.base import Source
from data.sources.packed_names import natural


def join(source: Source, classes: Sequence[str] | None) -> Source:
    """``source`` with its targets counted in ``classes``; None keeps its own classes.

    Labels that are all whole numbers, none of them a class name, are positions in ``classes`` (Swin's and Caffe's lists of a
    flat validation folder).

    Raises:
        DataError: a class with images that ``classes`` does not know.
    """
    if classes is None:
        if all(name.isdecimal() for name in source.classes) and source.classes != sorted(source.classes, key=natural) \
                and source.classes == sorted(source.classes):
            source.notices.append(Notice(f"{source.root}: numeric class folders stand in the order of their letters, as torchvision has "
                                  f"it ({', '.join(source.classes[:3])}, ...); timm counts them by number; DATA.CLASS_NAMES sets an order"))
        return source
    names = list(classes)
    if names == source.classes:
        return source
    found, number = source.classes, {name: i for i, name in enumerate(names)}
    unknown = sorted(set(found) - set(names))
    if len(unknown) == len(found) and all(name.isdecimal() and int(name) < len(names) for name in found):
        source.notices.append(Notice(f"{source.root}: its labels are numbers; they are taken for positions among the {len(names)} classes"))
        table = np.array([int(name) for name in found], dtype=np.int64)
    elif unknown:
        raise DataError(f"{source.root}: class {unknown[0]!r} is unknown to the training classes"
                        f" ({len(unknown)} such: {some(unknown, 3)}); rename or remove the folder, or train with it")
    else:
        table = np.array([number[name] for name in found], dtype=np.int64)
    absent = [names[i] for i in sorted(set(range(len(names))) - set(table.tolist()))]
    if absent:
        source.notices.append(Caution(f"{source.root}: {len(absent)} classes without a folder ({some(absent)})", "missing-classes"))
    source.targets, source.classes = table[source.targets] if len(table) else source.targets, names
    return source


def imagenet_classes() -> list[str]:
    """The WordNet ids of ImageNet's 1,000 classes in the order of every published classifier, from timm's list."""
    from timm.data import ImageNetInfo
    return list(ImageNetInfo("imagenet-1k").label_names())


def carried_by_timm(name: str) -> str | None:
    """The text of one of the lists that timm brings along, such as ``imagenet_a_synsets.txt``; None where it does not."""
    try:
        return (resources.files("timm.data") / "_info" / name).read_text(encoding="utf-8")
    except (OSError, ModuleNotFoundError):
        return None


def some(names: Sequence[str], count: int = 5) -> str:
    """The first few of ``names``."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def plain_number(label: str) -> str:
    """``label``, a whole number without its leading zeros."""
    return str(int(label)) if label.isascii() and label.isdecimal() else label


def numbered(labels: Sequence[str]) -> list[str]:
    """Class names for the labels of a list: names sorted as folders are; whole numbers by number.

    Numbers that begin at 0 and leave less than half the range empty are rows of the classifier, so that a gap stays a
    class without images; others are names like any.
    """
    distinct = set(labels)
    if not all(label.isascii() and label.isdecimal() for label in distinct):
        return sorted(distinct)
    numbers = sorted({int(label) for label in distinct})
    if numbers and numbers[0] == 0 and numbers[-1] < 2 * len(numbers):
        numbers = list(range(numbers[-1] + 1))
    return [str(number) for number in numbers]
