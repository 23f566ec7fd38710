"""Which predictions of a classifier count on which images: ImageNet's variants and their 200-class subsets, and the ReaL labels.

Sources: ImageNet-V2 (Recht et al., ICML 2019), folders numbered 0 to 999; ImageNet-A (Hendrycks et al., CVPR 2021) and ImageNet-R
(ICCV 2021), 200 classes each, among which predictions are chosen; ImageNet-Sketch (Wang et al., NeurIPS 2019); ReaL (Beyer et al., 2020),
several labels an image, images without any left out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from yacs.config import CfgNode

from config import LABEL_SETS, ConfigError
from data import DataError
from data.messages import Caution
from data.sources.base import Source
from data.sources.classes import first_few, imagenet_classes, timm_label_file
from data.sources.lists import read_text
from data.streaming.stream import Stream

_NAMES = {"v2": "ImageNet-V2", "a": "ImageNet-A", "r": "ImageNet-R", "sketch": "ImageNet-Sketch"}
_VALIDATION_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})", re.IGNORECASE)


@dataclass(frozen=True)
class LabelSet:
    """What an evaluation counts.

    Attributes:
        allowed: the classes that predictions are chosen from, as positions in the loaders' classes (K,); None allows all.
        headline: the figure is that among the allowed classes; else it stands beside that among all.
        real: the labels of each image, right predictions all, empty where the image does not count; None without ReaL labels.
        notices: lines the user should see.
    """

    allowed: np.ndarray | None = None
    headline: bool = False
    real: list[list[int]] | None = None
    notices: tuple[str, ...] = ()


class Labels:
    """TEST.LABELS, read and checked before long work begins."""

    def __init__(self, config: CfgNode):
        """
        Raises:
            ConfigError: an unknown set.
            DataError: a file that cannot be used.
        """
        self.name, path = config.TEST.LABELS, os.path.expanduser(config.TEST.LABELS)
        self.names: list[str] = []
        if self.name.lower() in LABEL_SETS:
            self.name = self.name.lower()
        elif os.path.isfile(path):
            self.names = [line.partition("\t")[0].strip() for line in read_text(path).splitlines() if line.strip()]
        else:
            raise ConfigError(f"TEST.LABELS is {self.name!r}; choose from {', '.join(LABEL_SETS)}, or give a text file of classes, one a "
                              "line")
        if config.TEST.REAL_LABELS and self.name != "real":
            raise ConfigError("TEST.REAL_LABELS is for the ReaL labels; add --labels real")
        self.real = _read_real(config.TEST.REAL_LABELS) if self.name == "real" else None

    def naming(self, own: Sequence[str] | None, thousand: bool) -> Callable[[Sequence[str]], Sequence[str] | None]:
        """What ``build_loaders`` takes for its classes; called without folders' names for a stream.

        Args:
            own: the class names of a checkpoint; None for published weights, which do not name them.
            thousand: published weights have a classifier of 1,000 classes.
        """
        def choose(found: Sequence[str]) -> Sequence[str] | None:
            numbers = all(name.isascii() and name.isdecimal() for name in found)
            if self.name == "v2" and not numbers:
                raise DataError(f"the class folders of ImageNet-V2 are numbers, these are not ({first_few(found, 3)}); leave --labels out")
            names = own if own is not None else imagenet_classes() if thousand and found else None
            if own is None and names and not (numbers and len(found) <= len(names)) and not set(found) <= set(names):
                names = None  # 1,000 classes of somebody else
            # Numbers of ImageNet-V2 and of ReaL count the sorted names, whatever order the classifier has.
            return sorted(names) if names and self.name in ("v2", "real") else names
        return choose

    def on(self, source: Source, classes: Sequence[str]) -> LabelSet:
        """What counts on the images of ``source``, whose targets are positions in ``classes``.

        Raises:
            DataError: the images are not those of the set.
        """
        if self.names:
            return LabelSet(_positions(self.names, classes, self.name), headline=True)
        if isinstance(source, Stream):  # which knows its images only when they come
            if self.name in ("a", "r", "real"):
                raise DataError(f"{source.root}: is a stream; --labels {self.name} needs the images on a disk")
            return LabelSet()
        present = np.unique(source.targets)
        absent = sorted(set(range(len(classes))) - set(present.tolist()))
        if self.name in ("imagenet", "sketch", "v2") and absent:
            raise DataError(f"{source.root}: lacks {len(absent)} of the classifier's {len(classes)} classes "
                            f"({first_few([classes[i] for i in absent], 3)}); leave --labels out to evaluate among those that are there")
        if self.name in ("a", "r"):
            if not absent:
                raise DataError(f"{source.root}: holds all of the classifier's {len(classes)} classes, {_NAMES[self.name]} has 200; "
                                "leave --labels out")
            return LabelSet(present, headline=True, notices=_compare_with_list(self.name, [classes[i] for i in present], source.root))
        if self.real is not None:
            return LabelSet(real=_real_of(source, self.real, len(classes)))
        return LabelSet(present if absent else None)


def _positions(names: Sequence[str], classes: Sequence[str], path: str) -> np.ndarray:
    number = {name: i for i, name in enumerate(classes)}
    unknown = [name for name in names if name not in number]
    if unknown:
        raise DataError(f"{path}: {unknown[0]!r} is no class of this classifier ({len(unknown)} such); its classes are "
                        f"{first_few(classes, 3)}")
    return np.array(sorted({number[name] for name in names}))


def _compare_with_list(name: str, present: Sequence[str], root: str) -> tuple[str, ...]:
    listed = timm_label_file(f"imagenet_{name}_synsets.txt")
    if listed is None or not all(re.fullmatch(r"n\d{8}", wnid) for wnid in present) or set(listed.split()) == set(present):
        return ()
    return (Caution(f"{root}: its {len(present)} classes are not the 200 of {_NAMES[name]}; predictions are chosen from those "
                    f"{len(present)}"),)


def _read_real(path: str) -> list[list[int]]:
    """The ReaL labels: a list of labels for each of the 50,000 validation images, by their number."""
    if path:
        text, path = read_text(os.path.expanduser(path)), os.path.expanduser(path)
    else:
        text, path = timm_label_file("imagenet_real_labels.json"), "timm's imagenet_real_labels.json"
        if text is None:
            raise ConfigError("this timm does not carry the ReaL labels; give real.json with --real-labels FILE")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(found, list) or not all(isinstance(row, list) and all(type(label) is int and label >= 0 for label in row)
                                              for row in found):
        raise DataError(f"{path}: is no list of lists of class numbers, an image each")
    return found


def _real_of(source: Source, real: list[list[int]], classes: int) -> list[list[int]]:
    """The labels of each image of ``source``, found by the number in its name."""
    labels = []
    for index in range(len(source)):
        name = _VALIDATION_IMAGE.search(os.path.basename(source.path(index)))
        if name is None or not 1 <= int(name[1]) <= len(real):
            raise DataError(f"{source.path(index)}: the ReaL labels go by the images' names, ILSVRC2012_val_00000001.JPEG to "
                            f"{len(real):08d}; this is none of them")
        labels.append(real[int(name[1]) - 1])
    highest = max((label for row in labels for label in row), default=0)
    if highest >= classes:
        raise DataError(f"the ReaL labels name class {highest}, the classifier has {classes} classes")
    return labels
