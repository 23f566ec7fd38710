"""Figures of each class from what an evaluation of maps or of segments counts. Imports no torch."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from utils.runtime.files import csv_writer


@dataclass(frozen=True)
class MapFigures:
    """What follows from confusion counts (..., C, C), truth in rows: shares between 0 and 1, nan where there is nothing to count."""

    counts: np.ndarray

    @property
    def pixels(self) -> np.ndarray:
        """(..., C): pixels of each class."""
        return self.counts.sum(-1)

    @property
    def right(self) -> np.ndarray:
        """(..., C): those recognised."""
        return np.diagonal(self.counts, axis1=-2, axis2=-1)

    @property
    def iou(self) -> np.ndarray:
        """(..., C): intersection over union."""
        return _share(self.right, self.pixels + self.counts.sum(-2) - self.right)

    @property
    def accuracy(self) -> np.ndarray:
        """(..., C): share of a class's pixels recognised."""
        return _share(self.right, self.pixels)

    def values(self) -> dict[str, float]:
        """The metrics of counts (C, C), in percent: ``miou``, ``pixel_accuracy``, ``mean_accuracy``."""
        shares = dict(miou=self.mean_iou(), pixel_accuracy=float(_share(self.right.sum(), self.pixels.sum())),
                      mean_accuracy=mean(self.accuracy))
        return {name: 100 * share for name, share in shares.items()}

    def mean_iou(self) -> float:
        """Of counts (C, C): the mean over the classes that occur, nan without any."""
        return mean(self.iou)

    def csv(self, names: Sequence[str]) -> str:
        """The table, a line a class, with the class that its pixels are mostly taken for wrongly, and how many are."""
        text = io.StringIO()
        writer = csv_writer(text)
        writer.writerow(["class", "iou", "accuracy", "pixels", "recognised", "answered", "mistaken_for", "times"])
        wrong = self.counts * (1 - np.eye(len(self.counts), dtype=np.int64))
        for i, name in enumerate(names):
            shares = ["" if math.isnan(value) else f"{value:.6f}" for value in (self.iou[i], self.accuracy[i])]
            taken = int(wrong[i].argmax())
            writer.writerow([name, *shares, self.pixels[i], self.right[i], self.counts[:, i].sum(),
                             names[taken] if wrong[i, taken] else "", wrong[i, taken]])
        return text.getvalue()


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)


def mean(values: np.ndarray) -> float:
    """Of those that are there, nan without any."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def class_quality(sums: np.ndarray) -> np.ndarray:
    """(C, 3): PQ, SQ and RQ of each class between 0 and 1, nan for one that does not occur."""
    overlap, matches, extra, missed = sums.T
    whole = matches + (extra + missed) / 2
    some = np.where(whole > 0, 0.0, np.nan)
    sq = np.divide(overlap, matches, out=some.copy(), where=matches > 0)
    rq = np.divide(matches, whole, out=some.copy(), where=whole > 0)
    return np.stack([sq * rq, sq, rq], axis=1)
