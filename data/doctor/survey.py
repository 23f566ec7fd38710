"""Everything the doctor knows about a data set before it judges: its splits, and a row of facts about every image."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from yacs.config import CfgNode

from config import ConfigError
from data.doctor.image_record import UNREADABLE
from data.doctor.worker_pool import Crew
from data.errors import DataError
from data.layouts import digits
from data.layouts.detect import Options, beside, recognise
from data.layouts.splits import choose_classes
from data.sources.base import Source, View
from data.sources.classes import join
from data.sources.folder import ImageFolder
from data.sources.index_cache import Entry, recording


@dataclass
class Split:
    """A split and what was found in it.

    Attributes:
        layout: what it was recognised as.
        classes: its own class names, before they were joined to the training classes.
        targets: (images,) int64, positions in ``Survey.classes``.
        rows: (images,) of ``data.examine.ROW``.
        reasons: why images cannot be read, by their number.
        entry: the index that the source was opened from, if one was.
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
    def movable(self) -> bool:
        """Whether an image is a file that may be taken out without a list of labels missing it."""
        return isinstance(base_of(self.source)[0], ImageFolder) and self.layout.startswith("class folders")


@dataclass
class Survey:
    """A data set as it was found.

    Attributes:
        splits: those that could be opened, of "train" and "val", in this order.
        classes: the training classes, then those that only validation has.
        known: how many of them training knows.
        failures: for each split that could not be opened the sentence that says why.
    """

    root: str
    config: CfgNode
    splits: dict[str, Split] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    known: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    processes: int = 0

    def counts(self, split: str, readable: bool = False) -> np.ndarray:
        """(classes,) images of each class; zeros for a split that is not there."""
        found = self.splits.get(split)
        if found is None:
            return np.zeros(len(self.classes), dtype=np.int64)
        return np.bincount(found.targets[found.readable] if readable else found.targets, minlength=len(self.classes))

    @property
    def images(self) -> int:
        return sum(len(split.targets) for split in self.splits.values())


def base_of(source: Source) -> tuple[Source, np.ndarray | None]:
    """(the source below all views, positions in it; None for all)."""
    indices = None
    while isinstance(source, View):
        indices = source.indices if indices is None else source.indices[indices]
        source = source.source
    return source, indices


def open_survey(config: CfgNode) -> Survey:
    """Find the splits and list their images; what training would stop for becomes a failure or an unknown class here.

    Raises:
        ConfigError: DATA.DATA_PATH is empty.
    """
    root = os.path.expanduser(config.DATA.DATA_PATH)
    if not root:
        raise ConfigError("DATA.DATA_PATH is empty; give the folder of the images with --data-path")
    if config.DATA.DATASET == "digits" and root == digits.DEFAULT_PATH:
        digits.ensure_digits(root)
    survey = Survey(root, config)
    listing = beside(config.DATA.CLASS_NAMES, root)
    for name in ("train", "val"):
        try:
            layout = recognise(root, Options.of(config), [name])
            with recording() as entries:
                source = layout.open[name]()
            source = choose_classes(source, listing) if listing else source
            own = list(source.classes)
            if "train" in survey.splits:
                source, survey.classes = _joined(source, survey.classes)
            else:
                source = join(source, None)
                survey.classes, survey.known = list(source.classes), len(source.classes)
        except DataError as error:
            survey.failures[name] = str(error)
            continue
        source.configure(config.DATA.EXIF, config.DATA.READ_PATIENCE)
        base = base_of(source)[0]
        entry = entries[0] if len(entries) == 1 and len(entries[0].index["targets"]) == len(base) else None
        survey.splits[name] = Split(name, layout.name, source, own, source.targets, np.zeros(0), entry=entry)
    return survey


def _joined(source: Source, classes: list[str]) -> tuple[Source, list[str]]:
    """A validation source under the training classes, those that training lacks added behind."""
    try:
        return join(source, classes), classes
    except DataError:
        known = set(classes)
        classes = classes + [name for name in source.classes if name not in known]
        return join(source, classes), classes


def read_all(survey: Survey, processes: int, timeout: float, progress: Callable[[int], None]) -> None:
    """Read and decode every image of the survey."""
    splits: Sequence[Split] = list(survey.splits.values())
    crew = Crew([split.source for split in splits], processes, timeout)
    for split, rows in zip(splits, crew.rows, strict=True):
        split.rows = rows
    crew.run(progress)
    for split, reasons in zip(splits, crew.reasons, strict=True):
        split.reasons = reasons
