"""Figures of maps of classes (semantic segmentation) from integer counts of pixels: the same for every batch size and number of ranks.

A class counts in the mean IoU where it occurs in the truth or in an answer, and in the mean accuracy where it occurs in the truth, as
mmsegmentation has it; over all pixels of all images together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from utils.evaluation.dense_figures import MapFigures
from utils.evaluation.metrics import Evaluation, Metric, line
from utils.runtime import distributed

MAP_METRICS = (
    Metric("miou", "mIoU"),
    Metric("pixel_accuracy", "pixel accuracy"),
    Metric("mean_accuracy", "mean accuracy"),
)
_TOLD = MAP_METRICS[:2]


def confusion(answer: Tensor, target: Tensor, classes: int) -> Tensor:
    """(C, C) int64: pixels of each true class (row) that were taken for each class (column), without waiting for the device.

    Args:
        answer: (H, W) classes.
        target: (H, W) classes; pixels of none of the ``classes`` (``IGNORED``) do not count.
    """
    target, answer = target.flatten().long(), answer.flatten().long()
    places = torch.where(target < classes, target * classes + answer, classes * classes)
    counts = torch.zeros(classes * classes + 1, dtype=torch.int64, device=places.device)
    return counts.scatter_add_(0, places, torch.ones_like(places))[:-1].view(classes, classes)


@dataclass(frozen=True)
class MapEvaluation(Evaluation):
    """An evaluation of maps.

    Attributes:
        counts: (C, C) int64, the confusion counts over all ranks.
    """

    counts: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int64))


class MapEvaluator:
    """Counts pixels on the device.

    Args:
        classes: names, in the order of the maps' values.
    """

    def __init__(self, classes: Sequence[str], device: torch.device):
        self.classes = classes
        self.counts = torch.zeros(len(classes), len(classes), dtype=torch.int64, device=device)
        self.images = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, outputs: Sequence[Tensor], targets: Sequence[Tensor | None]) -> None:
        """Take in maps (H, W) of classes and the true ones of the same sizes, of images of any size; None is an image that does not
        count."""
        for answer, target in zip(outputs, targets, strict=True):
            if target is not None:
                self.counts += confusion(answer, target.to(answer.device), len(self.classes)).to(self.counts.device)
                self.images += 1

    def result(self) -> MapEvaluation:
        """The figures over all ranks; every rank must ask."""
        # Copies: a second call must not add the ranks up again.
        images = int(distributed.all_reduce_sum(self.images.clone()))
        counts = distributed.all_reduce_sum(self.counts.clone()).cpu().numpy()
        values = MapFigures(counts).values()
        return MapEvaluation(values, images, line(_TOLD, values, f"({images} images)"), self._caution(counts), counts)

    def _caution(self, counts: np.ndarray) -> str:
        answers, there = np.flatnonzero(counts.sum(0)), np.flatnonzero(counts.sum(1))
        if len(answers) != 1 or len(there) < 2:
            return ""
        return (f"every pixel is taken for the class {self.classes[answers[0]]!r}, and nothing is told apart yet; where that stays so, "
                "train longer or with another --lr")
