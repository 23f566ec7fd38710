"""Panoptic quality (Kirillov et al., Panoptic Segmentation, CVPR 2019, section 4): how well segments of things and stuff are found.

A segment matches a true one of its class where their intersection over union is beyond a half, which at most one can do. SQ is the mean
overlap of the matches, RQ the F1 of the segments, PQ their product, each a mean over the classes that occur in the truth or in an answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from data.dense.base import DenseSource, Objects
from data.dense.shapes import decode_mask, mask_library
from utils.evaluation.dense_figures import class_quality
from utils.evaluation.metrics import Evaluation, Metric, line
from utils.inference.found import Panoptic
from utils.runtime import distributed

_GROUPS = {"": "", "_things": " things", "_stuff": " stuff"}
PANOPTIC_METRICS = tuple(Metric(f"{name}{suffix}", f"{name.upper()}{words}") for suffix, words in _GROUPS.items()
                         for name in ("pq", "sq", "rq"))


@dataclass(frozen=True)
class PanopticEvaluation(Evaluation):
    """An evaluation of segments.

    Attributes:
        sums: (C, 4) float64 of each class: overlaps of the matches added up, matches, segments that are not there, and segments missed.
    """

    sums: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))


class PanopticEvaluator:
    """Matches the segments of each image when it comes, and adds up in the order of the images: the same for any number of ranks.

    Args:
        source: the images, whose objects are their segments.
    """

    def __init__(self, source: DenseSource):
        mask_library()
        self.source = source
        self._sums: dict[int, dict[int, np.ndarray]] = {}
        self.evaluation: PanopticEvaluation | None = None  # once it was asked for

    def update(self, outputs: Sequence[Panoptic], numbers: Tensor) -> None:
        """Take in the segments of the images at positions ``numbers`` (B,) of the source; -1 is an image that does not count."""
        for number, found in zip(numbers.tolist(), outputs, strict=True):
            if number >= 0:
                self._sums[number] = matched(found, self.source.objects(number))

    def quality(self, number: int) -> float:
        """The mean PQ, between 0 and 1, of the classes in an image of this rank; nan without any."""
        sums = self._sums[number]
        return float(class_quality(np.stack(list(sums.values())))[:, 0].mean()) if sums else math.nan

    def result(self) -> PanopticEvaluation:
        """The figures over all ranks; every rank must ask."""
        images = {number: sums for part in distributed.gather_objects(self._sums) for number, sums in part.items()}
        sums = np.zeros((len(self.source.classes), 4))
        for number in sorted(images):
            for label, row in images[number].items():
                sums[label] += row
        values = quality(sums, self.source.things)
        told = [metric for metric in PANOPTIC_METRICS if metric.name in ("pq", "sq", "rq")]
        self.evaluation = PanopticEvaluation(values, len(images), line(told, values, f"({len(images)} images)"), _caution(images, sums),
                                             sums)
        return self.evaluation


def _caution(images: Mapping[int, object], sums: np.ndarray) -> str:
    if not images or sums[:, 1:3].any():
        return ""
    return "no segment was found in any image; where that stays so, train longer or with another --lr"


def matched(found: Panoptic, truth: Objects) -> dict[int, np.ndarray]:
    """By class, (4,) as of ``PanopticEvaluation.sums``, of one image.

    Pixels without a true segment do not count in the overlaps, and a segment that is not there counts only where at most half of it lies on
    them or on a crowd of its class.
    """
    true = _numbered(truth, found.segments.shape)
    sums: dict[int, np.ndarray] = {}

    def add(label: int, row: Sequence[float]) -> None:
        sums[label] = sums.get(label, np.zeros(4)) + row

    # pixels (true segment or 0, found segment or 0)
    common = np.bincount(true.ravel().astype(np.int64) * (len(found.labels) + 1) + found.segments.ravel(),
                         minlength=(len(truth) + 1) * (len(found.labels) + 1)).reshape(len(truth) + 1, -1)
    true_areas, areas = common[1:].sum(1), common[:, 1:].sum(0)
    unions = true_areas[:, None] + areas - common[1:, 1:] - common[0, 1:]
    overlaps = np.divide(common[1:, 1:], unions, out=np.zeros(unions.shape), where=unions > 0)
    alike = truth.labels[:, None] == found.labels
    matches = alike & ~truth.crowd[:, None] & (overlaps > 0.5)
    for i, j in zip(*np.nonzero(matches), strict=True):
        add(int(truth.labels[i]), (overlaps[i, j], 1, 0, 0))
    for i in np.flatnonzero(~matches.any(1) & ~truth.crowd & (true_areas > 0)):
        add(int(truth.labels[i]), (0, 0, 0, 1))
    excused = common[0, 1:] + (common[1:, 1:] * (alike & truth.crowd[:, None])).sum(0)
    for j in np.flatnonzero(~matches.any(0) & (areas > 0) & (2 * excused <= areas)):
        add(int(found.labels[j]), (0, 0, 1, 0))
    return sums


def _numbered(truth: Objects, size: Sequence[int]) -> np.ndarray:
    """(H, W) int32: of each pixel the number of its true segment from 1, 0 where there is none."""
    numbers = np.zeros(tuple(size), dtype=np.int32)
    for i, mask in enumerate(truth.masks or ()):
        numbers[decode_mask(mask)] = i + 1
    return numbers


def quality(sums: np.ndarray, things: Sequence[bool]) -> dict[str, float]:
    """``PANOPTIC_METRICS`` in percent, nan of a group without a class that occurs, from sums (C, 4)."""
    of_class, things = class_quality(sums), np.asarray(things, dtype=bool)
    values = {}
    for suffix, group in zip(_GROUPS, (np.ones(len(sums), dtype=bool), things, ~things), strict=True):
        group = group & ~np.isnan(of_class[:, 0])
        for name, column in zip(("pq", "sq", "rq"), of_class.T, strict=True):
            values[name + suffix] = 100 * float(column[group].mean()) if group.any() else math.nan
    return values
