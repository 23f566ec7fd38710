"""What the doctor's checks look at: the splits of a data set, and a record of each of their images."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from yacs.config import CfgNode

from config import ConfigError
from data.decoding.pillow import Reading
from data.doctor.image_record import UNREADABLE
from data.doctor.worker_pool import WorkerPool
from data.errors import DataError
from data.layouts import digits
from data.layouts.detect import detect_layout
from data.layouts.options import Options, resolve_data_file
from data.layouts.splits import choose_classes
from data.sources.base import Source, View
from data.sources.classes import match_classes
from data.sources.deep_levels import DeepLevels, settle_reading
from data.sources.folder import ImageFolder
from data.sources.index_cache import Entry, record_entries


@dataclass
class Split:
    """A split with the records of its images.

    Attributes:
        layout: the name of its layout.
        classes: its own class names, before they were matched to the training classes.
        targets: (images,) int64, positions in ``Survey.classes``.
        rows: (images,) of ``image_record.ROW``.
        reasons: why images cannot be read, by their index.
        entry: the entry of the index cache for its source; None where the source has none.
    """

    name: str
    layout: str
    source: Source
    classes: list[str]
    targets: np.ndarray
    rows: np.ndarray
    reasons: dict[int, str] = field(default_factory=dict)
    entry: Entry | None = None

    @property
    def readable(self) -> np.ndarray:
        """(images,) bool."""
        return (self.rows["flags"] & UNREADABLE) == 0

    @property
    def groups(self) -> np.ndarray:
        """(images,) int64, the same number for images of the same class, or of the same labels."""
        return self.targets if self.source.labels is None else self.source.labels.which

    def label(self, index: int, classes: Sequence[str]) -> str:
        """The class of an image, or its labels, by the names of ``Survey.classes``."""
        labels = self.source.labels
        return classes[self.targets[index]] if labels is None else "|".join(classes[i] for i in np.flatnonzero(labels[index] == 1))

    @property
    def movable(self) -> bool:
        """Whether images are files that may be moved away: not named by a list of labels."""
        return isinstance(base_of(self.source)[0], ImageFolder) and self.layout.startswith("class folders")


@dataclass
class Survey:
    """A data set with the records of its images.

    Attributes:
        splits: those that could be opened, of "train" and "val", in this order.
        classes: the training classes, then those that only validation has.
        known: the number of training classes.
        failures: why a split could not be opened, by its name.
        seconds: that reading all images took.
        processes: that read them.
        levels: the black and white level of images of more than 8 bits; None where there are none.
    """

    root: str
    config: CfgNode
    splits: dict[str, Split] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    known: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    processes: int = 0
    levels: DeepLevels | None = None

    def configure(self, source: Source) -> None:
        """Have the pixels of ``source``, the next split, read as those of the first one; of the first it is found out how."""
        data = self.config.DATA
        if self.splits:
            source.configure(next(iter(self.splits.values())).source.reading, data.READ_PATIENCE)
            return
        with contextlib.suppress(DataError):  # a file hangs, which is told when all are read
            self.levels = settle_reading(source, Reading.of(self.config), data.READ_PATIENCE, data.TIMEOUT)

    def counts(self, split: str, readable: bool = False) -> np.ndarray:
        """(classes,) numbers of images, all or the readable ones, an image with several labels counting for each; zeros for a split that
        could not be opened."""
        if split not in self.splits:
            return np.zeros(len(self.classes), dtype=np.int64)
        images = self.splits[split].readable if readable else slice(None)
        labels = self.splits[split].source.labels
        if labels is None:
            return np.bincount(self.splits[split].targets[images], minlength=len(self.classes))
        counts = labels.counts(images)
        return np.pad(counts, (0, len(self.classes) - len(counts)))

    @property
    def images(self) -> int:
        return sum(len(split.targets) for split in self.splits.values())


def base_of(source: Source) -> tuple[Source, np.ndarray | None]:
    """(the source below all views, the indices in it; None for all)."""
    indices = None
    while isinstance(source, View):
        indices = source.indices if indices is None else source.indices[indices]
        source = source.source
    return source, indices


def open_survey(config: CfgNode) -> Survey:
    """Find the splits and list their images. Where training would raise an error, this notes a failure or an unknown class.

    Raises:
        ConfigError: DATA.DATA_PATH is empty.
    """
    root = os.path.expanduser(config.DATA.DATA_PATH)
    if not root:
        raise ConfigError("DATA.DATA_PATH is empty; give the folder of the images with --data-path")
    if config.DATA.DATASET == "digits" and root == digits.DEFAULT_PATH:
        digits.ensure_digits(root)
    survey = Survey(root, config)
    class_file = resolve_data_file(config.DATA.CLASS_NAMES, root)
    for name in ("train", "val"):
        try:
            layout = detect_layout(root, Options.of(config), [name])
            with record_entries() as entries:
                source = layout.open[name]()
            source = choose_classes(source, class_file) if class_file else source
            own = list(source.classes)
            if "train" in survey.splits:
                source, survey.classes = _match_or_extend(source, survey.classes)
            else:
                source = match_classes(source, None)
                survey.classes, survey.known = list(source.classes), len(source.classes)
        except DataError as error:
            survey.failures[name] = str(error)
            continue
        survey.configure(source)
        base = base_of(source)[0]
        entry = entries[0] if len(entries) == 1 and len(entries[0].index["targets"]) == len(base) else None
        survey.splits[name] = Split(name, layout.name, source, own, source.targets, np.zeros(0), entry=entry)
    return survey


def _match_or_extend(source: Source, classes: list[str]) -> tuple[Source, list[str]]:
    """(a validation source with the training classes, these classes), with the classes that training lacks appended."""
    try:
        return match_classes(source, classes), classes
    except DataError:
        known = set(classes)
        classes = classes + [name for name in source.classes if name not in known]
        return match_classes(source, classes), classes


def read_all(survey: Survey, processes: int, timeout: float, progress: Callable[[int], None]) -> None:
    """Read and decode every image, and fill the splits' ``rows`` and ``reasons``.

    Args:
        processes: number of processes that read.
        timeout: seconds that one image may take.
        progress: called now and then with the number of images read.
    """
    splits: Sequence[Split] = list(survey.splits.values())
    pool = WorkerPool([split.source for split in splits], processes, timeout)
    for split, rows in zip(splits, pool.rows, strict=True):
        split.rows = rows
    pool.run(progress)
    for split, reasons in zip(splits, pool.reasons, strict=True):
        split.reasons = reasons
